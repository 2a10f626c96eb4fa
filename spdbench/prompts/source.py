"""What a source of prompts is: a part of a suite file that loads itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from spdbench.prompts.rows import Part, Text
from spdbench.types import Prompt

PLACEHOLDER = "{prompt}"
MAX_MEANT = 3
"""Files that a message names."""


@dataclass(frozen=True)
class Place:
    """The context of a suite's sources: relative paths start from `base`; rows that name no category get `category`.

    `unjudged` tells of a category that its answers are not scored: references in it that are no texts are dropped.
    `may_run_code` is the user's permission to run code that a source brings along.
    """

    suite: str
    base: Path
    category: str
    unjudged: Callable[[str], bool] = lambda _: False
    may_run_code: bool = False


@dataclass(frozen=True)
class Loaded:
    """Prompts as their source has them, before template and limit. `title` names the source without absolute paths.

    `missing` says why the prompts have no references, if those should come from another source that is not present.
    """

    prompts: tuple[Prompt, ...]
    title: str
    missing: str = ""


def _has_placeholder(template: str) -> str:
    if PLACEHOLDER not in template:
        raise ValueError(f"must hold {PLACEHOLDER}, where the text of each turn goes")
    return template


def _relative(path: str) -> str:
    if PurePosixPath(path).is_absolute():
        raise ValueError("must be a relative path")
    if ".." in PurePosixPath(path).parts:  # a suite is data from anywhere, and what it reads goes to models and servers
        raise ValueError("must stay within its folder, without '..'; --data DIR gives another folder")
    if "\0" in path:
        raise ValueError("must be a path, but holds a NUL character")
    return path


Template = Annotated[str, AfterValidator(_has_placeholder)]
RelativePath = Annotated[Text, AfterValidator(_relative)]


class Source(Part, ABC):
    """Base of the kinds of source. In a suite file, the key named like `kind` distinguishes them."""

    kind: ClassVar[str]
    template: Template | None = Field(None, description="wraps each user turn; beats the suite's own")

    @property
    @abstractmethod
    def title(self) -> str:
        """The source's name in messages and in the result file; never contains an absolute path."""

    @abstractmethod
    def load(self, place: Place) -> Loaded:
        """The source's prompts.

        Raises:
            SourceUnavailable: it is not present; try the next one.
            InputError: it is present but cannot be used; the message names file, line and key.
        """


def no_such_file(base: Path, path: str) -> str:
    """Why there is no file `path` below `base`, with files that may be the one that is meant."""
    file = base / path
    reason = f"no such file below {base}"
    with suppress(OSError, ValueError):
        beside = [] if file.parent == base or not file.parent.is_dir() else [*file.parent.iterdir()]
        elsewhere = (base / file.name, base / "data" / path, *beside)
        meant = sorted({str(found.relative_to(base)) for found in elsewhere if found.is_file()})[:MAX_MEANT]
        if meant:
            return f"{reason}, which has {', '.join(meant)}"
    return reason
