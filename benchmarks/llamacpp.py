"""Vanilla against llama.cpp on the same GGUF file: same prompt ids, threads and number of tokens.

Why: llama.cpp is the usual engine on a CPU. It is the reference, although it has an advantage: it reads the file's
4-bit weights directly, a third of the bytes that vanilla reads in bfloat16 and a sixth of those in float32, since
vanilla dequantises them. So the table also has the bytes a token, and the rate at which each side reads them shows how
well it uses the machine.
Regimes: batch 1, greedy, four prompts of different kinds; vanilla in both dtypes; llama.cpp as llama-cpp-python sets
it up, in a process of its own (of another Python, with --python).
Output: a row a prompt and side, and one a side for all prompts (the sum of each round). `call` is the time of the whole
call over the number of new tokens, `decode` that after the first new token over the others; medians in ms with the
extremes, and each over llama.cpp's, round by round, as median and quartiles (below 1, vanilla is the faster one). Then
MB read a token and GB/s read while decoding, and how many new ids agree with llama.cpp's before the first difference,
which comes sooner or later, since llama.cpp rounds activations to 8 bits. Without llama-cpp-python it says so in one
line and ends.
The sides take turns, A B C A B C, after a warm-up each.

    python -m benchmarks.llamacpp [--python OTHER/bin/python] [--rounds 7] [--tokens 64] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.shared import llamacpp_side, sides
from benchmarks.shared.sides import Report, Row, mean_by_round, milliseconds, ratio, show, spread, take_turns, times
from benchmarks.shared.workload import MODEL, Decoded, common_prefix, prompt_ids, vanilla_side
from spdbench.models.checkpoints.embedded import embedded_gguf
from spdbench.models.target import load_target

THEIRS = "llama.cpp"
ALL = "all"
HEADERS = (
    *("prompt", "side", "call, ms/token", "over llama.cpp's", "decode, ms/token", "over llama.cpp's"),
    *("MB/token", "GB/s", "same ids"),
)


def main() -> None:
    arguments = sides.parser(__doc__, rounds=7, tokens=64)
    arguments.add_argument("--python", default=sys.executable, help="a Python that has llama-cpp-python")
    chosen = arguments.parse_args()
    if (version := installed_version(chosen.python)) is None:
        print(f"skipped: llama-cpp-python is not installed for {chosen.python}; see --python")
        return
    print(f"llama-cpp-python {version}")
    sides.run("llamacpp", chosen, measure)


def installed_version(python: str) -> str | None:
    code = "import llama_cpp; print(llama_cpp.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def measure(chosen: argparse.Namespace, report: Report) -> None:
    file = embedded_gguf()
    targets = {dtype: load_target(MODEL, dtype, "cpu") for dtype in chosen.dtypes}
    prompts = prompt_ids(targets[chosen.dtypes[0]])
    weight_bytes, kinds = gguf_weights(file)
    bytes_read = {THEIRS: weight_bytes}
    for dtype, target in targets.items():
        bytes_read[dtype] = target.decoder.bytes_per_token(target.decoder.layers, head=True)
    context = max(map(len, prompts.values())) + chosen.tokens
    every: dict[tuple[str, str], Callable[[], Decoded]] = {}
    with LlamaCpp(chosen.python, file, chosen.threads, context) as llama:
        for name, ids in prompts.items():
            every |= {(name, dtype): vanilla_side(target, ids, chosen.tokens) for dtype, target in targets.items()}
            every[name, THEIRS] = llama.side(ids, chosen.tokens)
        turns = take_turns(every, chosen.rounds)
    rows = as_rows(turns, bytes_read, chosen.tokens)
    report.tables["llamacpp"] = rows
    report.settings = {**report.settings, "gguf_tensors": kinds}
    print(f"{file.name} holds {', '.join(f'{count} {kind}' for kind, count in kinds.items())} tensors")
    print(
        f"mind: llama.cpp reads these as they are, {weight_bytes / 1e6:.0f} MB a token; "
        + "; ".join(f"vanilla reads {bytes_read[dtype] / 1e6:.0f} MB in {dtype}" for dtype in chosen.dtypes)
    )
    show(
        HEADERS,
        [
            [
                row["prompt"],
                row["side"],
                milliseconds(row["call"]),
                times(row["call_ratio"]),
                milliseconds(row["decode"]),
                times(row["decode_ratio"]),
                f"{row['bytes_per_token'] / 1e6:.0f}",
                f"{row['bytes_per_token'] / row['decode'].median / 1e9:.1f}",
                "" if row["same_ids"] is None else row["same_ids"],
            ]
            for row in rows
        ],
    )


def as_rows(turns: dict[tuple[str, str], list[Decoded]], bytes_read: dict[str, int], tokens: int) -> list[Row]:
    """A row for each prompt and side, and for each side over all prompts; times in seconds a token."""
    names = list(dict.fromkeys(name for name, _ in turns))
    call = {key: [turn.seconds / tokens for turn in decoded] for key, decoded in turns.items()}
    decode = {
        key: [(turn.seconds - turn.first_seconds) / max(1, tokens - 1) for turn in decoded]
        for key, decoded in turns.items()
    }
    for seconds in (call, decode):
        for side in dict.fromkeys(side for _, side in turns):
            seconds[ALL, side] = mean_by_round([seconds[name, side] for name in names])
    return [
        {
            "prompt": name,
            "side": side if side == THEIRS else f"vanilla, {side}",
            "call": spread(call[name, side]),
            "call_ratio": ratio(call[name, side], call[name, THEIRS]),
            "decode": spread(decode[name, side]),
            "decode_ratio": ratio(decode[name, side], decode[name, THEIRS]),
            "bytes_per_token": bytes_read[side],
            "same_ids": None if name == ALL else common_prefix(turns[name, side][0].ids, turns[name, THEIRS][0].ids),
        }
        for name, side in call
    ]


def gguf_weights(file: Path) -> tuple[int, dict[str, int]]:
    """Bytes of all tensors, each of which one token's forward reads (the embedding as the head), and their types."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors), dict(Counter(tensor.tensor_type.name for tensor in tensors))


class LlamaCpp:
    """The child process that decodes."""

    def __init__(self, python: str, file: Path, threads: int, context: int) -> None:
        command = [python, llamacpp_side.__file__, str(file), str(threads), str(context)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, trace)  # closes its stdin, which ends it

    def side(self, prompt: tuple[int, ...], tokens: int) -> Callable[[], Decoded]:
        request = json.dumps({"prompt": prompt, "tokens": tokens}) + "\n"

        def side() -> Decoded:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            if not line:
                sys.exit("llama.cpp's process ended; see its output above")
            answer: dict[str, Any] = json.loads(line)
            return Decoded(answer["seconds"], tuple(answer["ids"]), answer["first_seconds"])

        return side


if __name__ == "__main__":
    main()
