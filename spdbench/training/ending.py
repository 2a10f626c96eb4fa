"""Whether the drafter in a folder is the end of the very run that is asked for. Knows files, no method.

Every run begins `train.jsonl` anew with its settings, and only when its drafter is written does the log get a last
line that says so. A drafter that an earlier run left in the folder is thus never taken for that of a later one, which
may have been killed before it had anything to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spdbench.errors import InputError
from spdbench.training import checkpoint, log


def is_finished(folder: Path, identity: Mapping[str, Any], layout: str) -> bool:
    """True if the run of these settings has ended in `folder`, which has no checkpoint, with files in this layout.

    Raises:
        InputError: what lies there is of a run with other settings, or of none.
    """
    path, drafter = folder / log.NAME, folder / "config.json"
    if not path.exists():
        if drafter.exists():
            raise InputError(
                f"--resume: {folder} holds a model or a drafter, but no {log.NAME} of a run that could go on; "
                "choose another --out"
            )
        return False
    first, last = log.ends(path)
    if not first:  # killed before it could write anything
        return False
    checkpoint.require_same(first, identity, path)
    if not last.get("finished") or not drafter.exists():
        return False
    checkpoint.require_same(last, {"format": layout}, path)
    return True


def mark_finished(folder: Path, layout: str) -> None:
    """Says that the run's drafter has been written."""
    path = folder / log.NAME
    ended = log.TrainingLog(path, path.stat().st_size)
    ended.write({"finished": True, "format": layout})
    ended.sync()
    ended.close()
