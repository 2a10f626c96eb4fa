"""What a result was asked to do, and where: what must be equal before two of them may be held against each other.

Must not know runs, tables or verdicts.
"""

from __future__ import annotations

from spdbench.judge.results.schema import Result


def workload(head: Result) -> str:
    """Equal for results that did the same work: suite, model, dtype and decoding."""
    suite, model = head.suite, head.model
    return repr((suite.name, suite.version, suite.sha256, model.sha256, model.dtype, head.decoding.model_dump()))


def machine(head: Result) -> str:
    return repr(head.environment.get("fingerprint"))


def same_machine(base: Result, mine: Result) -> bool:
    """True if both are known to be of one machine and its software."""
    return base.environment.get("fingerprint") is not None and machine(base) == machine(mine)


def differences(base: Result, mine: Result) -> list[str]:
    """What of `workload` differs, each with both values."""
    found = []
    for name, *values in (
        ("suite", *(f"{head.suite.name} v{head.suite.version}" for head in (base, mine))),
        ("model", base.model.id, mine.model.id),
    ):
        hashes = [getattr(head, name).sha256 for head in (base, mine)]
        if values[0] != values[1]:
            found.append(f"{name} ({values[0]}, not {values[1]})")
        elif hashes[0] != hashes[1]:
            found.append(f"{name} ({values[0]} {hashes[0][:8]}, not {hashes[1][:8]})")
    if base.model.dtype != mine.model.dtype:
        found.append(f"dtype ({base.model.dtype}, not {mine.model.dtype})")
    others = mine.decoding.model_dump()
    pairs = [(name, value, others[name]) for name, value in base.decoding.model_dump().items()]
    changed = [f"{name} {value}, not {other}" for name, value, other in pairs if value != other]
    return [*found, f"decoding ({', '.join(changed)})"] if changed else found
