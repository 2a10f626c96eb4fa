"""Flags: what a reader must know before believing a number, each with one line of why and one of what to do.

docs/metrics.md, "Flags", is the list. Those that need two results are raised in `compare.py`, the others here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdbench.console import counted
from spdbench.judge.results.machine_load import BUSY_SHARE, PARTS
from spdbench.judge.results.schema import BackendRecord, Divergence, DrafterRecord, Flag, ModelInfo

FEW_PROMPTS = 8
NOISY_SHARE = 0.10
SLOW_ROOFLINE_SHARE = 0.4
SLOW_KERNELS = frozenset({"transformers"})
UNATTRIBUTED_SHARE = 0.10
DRIFT_SHARE = 0.05
DRIFT_P_VALUE = 0.01
MAX_NAMED = 3
OTHER_ANSWERS = "Start both with the same weights and settings; what differs then is a bug of the server"
TOO_SLOW = "Speed-ups look too high"
FOREIGN_LAYERS = f"{TOO_SLOW}: use a model that spdbench's own layers know"


@dataclass(frozen=True)
class FlagKind:
    """What to do about a flag; a row with one that `disqualifies` is never shown as best."""

    remedy: str
    disqualifies: bool = False
    needs_two: bool = False


KINDS = {
    "other_model": FlagKind(
        "Compare it with a baseline of the same weights",
        disqualifies=True,
    ),
    "lossy": FlagKind("Choose a lossless rule, or judge its answers by their score", disqualifies=True),
    "diverged": FlagKind("Run in float32 on the CPU: what differs there is a bug", disqualifies=True),
    "synthetic_drafter": FlagKind("Measure a trained one; this is a what-if", disqualifies=True),
    "untrained_drafter": FlagKind("Name a trained one with --drafter", disqualifies=True),
    "degenerate": FlagKind("Use prompts that suit the model, or a model for chat"),
    "no_template": FlagKind("Name its format (--chat-template), or read answers first"),
    "contradicted": FlagKind("Count its tokens another way (-o LABEL.count)"),
    "truncated": FlagKind("Raise --max-new-tokens if answers of full length matter"),
    "few_prompts": FlagKind(f"Measure at least {FEW_PROMPTS} (--limit)"),
    "noisy": FlagKind("Add prompts (--limit) or --repeats on an idle machine"),
    "slow_baseline": FlagKind(f"{TOO_SLOW}: try other --threads, --dtype"),
    "unattributed": FlagKind("Leave the machine idle; its spans may be incomplete", disqualifies=True),
    "drift": FlagKind("Measure again on an idle machine that has warmed up"),
    "outliers": FlagKind("Measure again on an idle machine, with --repeats"),
    "busy_machine": FlagKind("End other programs, or measure disturbed requests again: --remeasure 2"),
    "hardware_mismatch": FlagKind(
        "Measure both on one machine, in one `spdbench run`", disqualifies=True, needs_two=True
    ),
    "apart": FlagKind("Measure both in one `spdbench run`, in which they take turns", needs_two=True),
    "template_mismatch": FlagKind("Use the same model files for both", disqualifies=True, needs_two=True),
    "prompt_mismatch": FlagKind(
        "Measure both in one `spdbench run`",
        disqualifies=True,
        needs_two=True,
    ),
}
CAUSES = {
    "others": "other work",
    "steal": "the hypervisor",
    "throttled": "the quota",
    "hot": "overheating",
    "memory": "lack of memory",
    "gpu": "others on the GPU",
    "clock": "a slow clock",
}
AGAINST = {
    "steal": "try another time",
    "throttled": "give fewer --threads",
    "hot": "let it cool",
    "memory": "free some",
    "clock": "let it cool",
}
SHARE_OF = {"others": "all cores", "steal": "all cores", "gpu": "the GPU"}
"""What took the machine's time, what to do about it, and what was taken, in few words."""
DISQUALIFYING = frozenset(name for name, kind in KINDS.items() if kind.disqualifies)
MADE_FROM_ONE_RESULT = frozenset(name for name, kind in KINDS.items() if not kind.needs_two)
"""What `flags_for` finds, and so computes anew whenever a file is read."""


def make_flag(name: str, reason: str, remedy: str | None = None) -> Flag:
    """A flag of a kind in `KINDS`, with that kind's remedy unless there is a better one."""
    return Flag(name=name, reason=reason, remedy=remedy or KINDS[name].remedy)


def disqualifies(flags: Sequence[Flag]) -> bool:
    return any(flag.name in DISQUALIFYING for flag in flags)


def flags_for(
    overall: Mapping[str, Any],
    backend: BackendRecord,
    model: ModelInfo,
    drafter: DrafterRecord | None,
    divergence: Divergence | None,
) -> list[Flag]:
    """The flags that one result shows by itself; `overall` are its metrics over all prompts."""
    return [
        *_output_flags(backend, divergence),
        *_template_flags(backend, model),
        *_drafter_flags(drafter),
        *_sample_flags(overall),
        *_speed_flags(overall, backend),
        *_steadiness_flags(overall),
        *_machine_flags(overall),
    ]


def _output_flags(backend: BackendRecord, divergence: Divergence | None) -> Iterator[Flag]:
    if backend.other_model is not None:
        reason = f"it runs {backend.other_model}, whose weights, precision and place need not be vanilla's"
        yield make_flag("other_model", reason)
    if backend.lossy:
        yield make_flag("lossy", "its outputs are not the target model's own, by design")
    elif backend.other_model is not None and divergence is not None:
        if divergence.real:  # a server need not report what it takes to tell a tie
            reason = (
                f"{divergence.real} of {sum(divergence.counts.values())} answers differ from the first server's, by "
            )
            yield make_flag("diverged", reason + "more than a tie in its log-probabilities explains", OTHER_ANSWERS)
    elif divergence is not None and (divergence.real or divergence.unclassified):
        yield diverged(
            divergence.real + divergence.unclassified,
            sum(divergence.counts.values()),
            classified=not divergence.unclassified,
        )


def _template_flags(backend: BackendRecord, model: ModelInfo) -> Iterator[Flag]:
    """None where a server puts the conversation into a format of its own, or has the only copy of the model."""
    own = backend.chosen.get("prompt") != "messages" and model.num_layers is not None
    if own and model.template_sha256 is None:
        yield make_flag("no_template", "the model has no chat template, so conversations were fed to it as plain text")


def diverged(num_different: int, num_compared: int, *, classified: bool) -> Flag:
    """The flag for outputs that are not vanilla's; `classified` if each first difference was traced to the logits."""
    why = "by more than a tie in the logits explains" if classified else "and not every difference is shown to be a tie"
    return make_flag("diverged", f"{num_different} of {num_compared} outputs differ from vanilla's, {why}")


def is_untrained(drafter: DrafterRecord) -> bool:
    """True for a head with random weights."""
    return drafter.id == "random" or (drafter.trained_tokens == 0 and not drafter.synthetic)


def _drafter_flags(drafter: DrafterRecord | None) -> Iterator[Flag]:
    if drafter is not None and drafter.synthetic:
        reason = f"the drafts come from {drafter.id}, which knows the answers: its acceptance was set, not earned"
        yield make_flag("synthetic_drafter", reason)
    if drafter is not None and is_untrained(drafter):
        yield make_flag("untrained_drafter", "the drafter has random weights, so next to nothing is accepted")


def _sample_flags(overall: Mapping[str, Any]) -> Iterator[Flag]:
    num_runs, num_prompts = overall["num_runs"], overall["num_prompts"]
    if overall["num_degenerate"]:
        rest = overall.get("acceptance_rate_without_degenerate")
        without = "" if rest is None else f" (without them {rest:.1%} of the drafts are accepted)"
        reason = f"{overall['num_degenerate']} of {num_runs} outputs end in a loop, which is easy to draft{without}"
        yield make_flag("degenerate", reason)
    if overall["num_contradicted"]:
        reason = f"{overall['num_contradicted']} of {num_runs} answers have counts of the server's that contradict each"
        yield make_flag("contradicted", f"{reason} other: the tokens that it lists count, where it lists them")
    if 2 * overall["num_truncated"] > num_runs:
        yield make_flag("truncated", f"{overall['num_truncated']} of {num_runs} outputs were cut by the token limit")
    yield from few_prompts(num_prompts, "with an answer")


def few_prompts(num_prompts: int, which: str) -> Iterator[Flag]:
    """The flag, where there are fewer prompts than a speed-up can be told from; `which` says of what kind they are."""
    if num_prompts < FEW_PROMPTS:
        yield make_flag("few_prompts", f"only {counted(num_prompts, 'prompt')} {which}")


def _speed_flags(overall: Mapping[str, Any], backend: BackendRecord) -> Iterator[Flag]:
    if interval_is_noisy(overall["decode_tokens_per_s"], overall["decode_tokens_per_s_ci"]):
        yield noisy("tokens/s", overall["decode_tokens_per_s"], overall["decode_tokens_per_s_ci"])
    share = overall["roofline_share"]
    if share is None and backend.kind == "autoregressive" and backend.kernels in SLOW_KERNELS:
        yield make_flag(
            "slow_baseline",
            "vanilla runs on transformers' layers, as spdbench's own do not know this model, and what the machine "
            "allows was not measured",
            FOREIGN_LAYERS,
        )
    if share is not None and share < SLOW_ROOFLINE_SHARE:
        against = f"{TOO_SLOW}: measure on an idle machine" if overall["is_busy"] else None
        reason = f"vanilla reaches {share:.0%} of what memory bandwidth allows, which makes every speed-up look higher"
        yield make_flag("slow_baseline", reason, FOREIGN_LAYERS if backend.kernels in SLOW_KERNELS else against)
    share = overall["unattributed"]
    if share is not None and share > UNATTRIBUTED_SHARE:
        reason = f"{share:.0%} of the lanes' decode time is idle for reasons that its spans do not show"
        yield make_flag("unattributed", reason)


def _steadiness_flags(overall: Mapping[str, Any]) -> Iterator[Flag]:
    drift = overall["drift"]
    if drift is not None and abs(drift) > DRIFT_SHARE and overall["drift_p_value"] < DRIFT_P_VALUE:
        yield make_flag(
            "drift",
            f"the time a step {'rose' if drift > 0 else 'fell'} by {abs(drift):.0%} from the first request to the "
            "last, which is neither chance nor the prompts' length",
        )
    if outliers := overall["outliers"]:
        names = list(dict.fromkeys(outliers))
        named = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else "")
        yield make_flag(
            "outliers",
            f"{len(outliers)} of {overall['num_runs']} requests took far more or far less time a step than the others "
            f"({named})",
        )


def _machine_flags(overall: Mapping[str, Any]) -> Iterator[Flag]:
    """The programs that used the processors while requests were timed, and how much of them."""
    slow = overall["slow_clock"] or 0.0
    if not overall["is_busy"] and slow <= BUSY_SHARE:
        return
    shares = {part: overall[f"busy_{part}"] or 0.0 for part in PARTS}
    names = ", ".join(_programs(overall["disturbed_by"] or [])[:MAX_NAMED])
    words = {**PARTS, "others": f"{PARTS['others']} ({names})"} if names else PARTS
    largest = sorted((part for part in PARTS if shares[part] >= 0.01), key=lambda part: -shares[part])
    parts = [f"{words[part]} took {shares[part]:.0%}" for part in largest]
    parts += [f"clocks below 80 % of the run's highest took {slow:.0%}"] * (slow > BUSY_SHARE)
    count = f"{overall['num_disturbed']} of {overall['num_runs']} requests were disturbed"
    cause, share = (largest[0], shares[largest[0]]) if largest and shares[largest[0]] > slow else ("clock", slow)
    who = names if names and cause == "others" else CAUSES[cause]
    against = AGAINST.get(cause, "end them" if "," in who or cause == "gpu" else "end it")
    remedy = f"{who} took {share:.0%} of {SHARE_OF.get(cause, 'the time')}"
    yield make_flag(
        "busy_machine",
        f"{', '.join(parts)} of the time in which requests were measured; {count}",
        f"{remedy}: {against}, or --remeasure 2",
    )


def _programs(processes: Sequence[str]) -> list[str]:
    """`processes` such as `python (pid 123)`, each program once: without its number where several ran."""
    found: dict[str, set[str]] = {}
    for process in processes:
        found.setdefault(process.partition(" (pid ")[0], set()).add(process)
    words = [each.pop() if len(each) == 1 else f"{name} (several)" for name, each in found.items()]
    return [f"another {each}" if each.split()[0] == "spdbench" else each for each in words]


def interval_is_noisy(value: float | None, interval: Sequence[float] | None) -> bool:
    """True if a 95 % `interval` is wider than +-10 % of its `value`."""
    return bool(value and interval and (interval[1] - interval[0]) / 2 > NOISY_SHARE * value)


def noisy(name: str, value: float, interval: Sequence[float]) -> Flag:
    half_width = (interval[1] - interval[0]) / 2 / value
    return make_flag("noisy", f"the 95 % interval of {name} is +-{half_width:.0%}")
