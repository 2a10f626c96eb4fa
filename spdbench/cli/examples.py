"""Examples of each command, which end its `--help`."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "run": (
        "spdbench run quick -b vanilla -b eagle --limit 8",
        "spdbench run ./mine.yaml -m ./my-model -b vanilla -b ngram",
        "spdbench run quick -b two=spd -o two.stages=2 -b vanilla",
    ),
    "sweep": ("spdbench sweep grid.yaml --dry-run", "spdbench sweep grid.yaml --best speedup"),
    "train": ("spdbench train spd --data chats.jsonl --out ./head --stages 3 --budget 20m",),
    "compare": (
        "spdbench compare results/ --by category",
        "spdbench compare results/ --baseline eagle --format csv",
    ),
    "report": (
        "spdbench report results/ -o report.html",
        "spdbench report results/ --chart speedup --format pdf --style paper",
    ),
    "trace": ("spdbench trace results/quick__spd__smollm2.json -o trace.json",),
    "show": ("spdbench show results/quick__eagle__smollm2.json maths-1",),
    "answers": ("spdbench answers results/ --prompt maths-1",),
    "results": (
        "spdbench results --suite 'mt*' --backend eagle",
        "spdbench results --before 2026-01-01 --delete",
    ),
    "check": (
        "spdbench check new/ --baseline base/ --gate exact",
        "spdbench check base/ --baseline base/ --calibrate",
    ),
    "project": ("spdbench project results/ --stages 2,4,8",),
    "profile": ("spdbench profile -o here.json", "spdbench profile --from h100-sxm -o h100.json"),
    "import": ("spdbench import benchmarks.json --results results/",),
    "audit": ("spdbench audit quick -b eagle -b medusa --limit 8",),
    "distill": ("spdbench distill --out chats.jsonl --tokens 100000",),
    "eval": ("spdbench eval -b vanilla -b eagle --tasks gsm8k --limit 20",),
    "backends": ("spdbench backends", "spdbench backends spd"),
    "suites": ("spdbench suites", "spdbench suites quick"),
    "completion": (
        "spdbench completion bash >> ~/.bashrc",
        "spdbench completion fish > ~/.config/fish/completions/spdbench.fish",
    ),
    "env": ("spdbench env --json", "spdbench env --check"),
}
"""By command; `lm-eval` prints lm-eval's own help."""


def epilog(name: str) -> str | None:
    """The examples of command `name` as the end of its help; None without any."""
    lines = EXAMPLES.get(name)
    return None if lines is None else "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
