"""lm-eval's tasks for tests: `gsm8k` and `humaneval` over a few sentences of our own, as a user would keep them."""

from __future__ import annotations

from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures" / "lm_eval"


def copy_tasks(folder: Path) -> Path:
    """The task files in `folder`, with its name in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in FIXTURES.iterdir():
        if path.is_file():
            text = path.read_text(encoding="utf-8").replace("FOLDER", str(folder))
            (folder / path.name).write_text(text, encoding="utf-8")
    return folder
