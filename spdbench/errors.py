"""Errors that a user can correct, and their exit codes.

    SpdbenchError                 exit 1   something failed; the message says what
    ├── BackendLostError          exit 1   a backend failed for good, such as by the death of one of its processes
    ├── PromptFailedError         exit 1   one prompt failed for a reason outside of spdbench; the run continues
    ├── TryAgainError             exit 1   a backend cannot answer now, but may answer later
    ├── InputError                exit 2   wrong usage or input: names file, key, value and what is allowed
    │   └── NotRunError           exit 2   a program that a model wrote could not be run
    └── NotComparableError        exit 4   results that may not be in one table

Anything else that escapes is a bug and shows its traceback. Each kind has an `anchor` on the page about messages,
`docs/troubleshooting.md`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound="BaseModel")

TROUBLESHOOTING = "docs/troubleshooting.md"


class SpdbenchError(Exception):
    """Base of every error that spdbench raises on purpose.

    `names_page`: the command line adds where the page says more, for kinds whose messages cannot hold all remedies.
    `is_transient`: the reason may pass, as a lost connection may, so that `--resume` asks a request again that failed
    for it; it keeps other failures.
    """

    exit_code = 1
    anchor: ClassVar[str] = "something-failed"
    names_page: ClassVar[bool] = True

    def __init__(self, *args: object, is_transient: bool = False) -> None:
        super().__init__(*args)
        self.is_transient = is_transient

    @property
    def see(self) -> str:
        """Where the documentation says more of this kind of error."""
        return f"{TROUBLESHOOTING}#{self.anchor}"


class BackendLostError(SpdbenchError):
    """A backend failed for good: its current prompt has failed, and the run ends with what it has."""

    anchor = "backend-lost"


class PromptFailedError(SpdbenchError):
    """One prompt cannot be answered, for a reason that is no bug; the next one may be answered."""

    anchor = "prompt-failed"


class TryAgainError(SpdbenchError):
    """The request should be repeated after `wait_s` seconds. The code that raises it limits how often."""

    anchor = "try-again"

    def __init__(self, reason: str, wait_s: float) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class InputError(SpdbenchError):
    """The user's input cannot be used as it is. The message says what to do instead."""

    exit_code = 2
    anchor = "wrong-input"
    names_page = False


class NotRunError(InputError):
    """A program that a model wrote could not be run, so that its result is unknown."""

    anchor = "not-run"
    names_page = True


class NotComparableError(SpdbenchError):
    """These results may not be compared with each other."""

    exit_code = 4
    anchor = "not-comparable"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something close to `word` is known, followed by all that is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"{hint} Known: {', '.join(names) or 'none'}."


def install_command(package: str) -> str:
    """The command that installs `package` here: environments that uv makes have no pip.

    For `spdbench[EXTRA,...]` it names what the extras need, since spdbench itself need not be on an index.
    """
    tool = "pip install" if importlib.util.find_spec("pip") else "uv pip install"
    needs = _of_extras(package) if "[" in package else [package]
    return " ".join([tool, *(need if need.replace("-", "").isalnum() else f"'{need}'" for need in needs)])


def _of_extras(package: str) -> list[str]:
    """The requirements of the extras in `PROJECT[EXTRA,...]`; `package` itself where it declares none."""
    from importlib import metadata  # a slow import, which `--help` does without

    project, _, extras = package.removesuffix("]").partition("[")
    markers = {f'extra == "{extra}"' for extra in extras.split(",")}
    lines = [line.partition("; ") for line in metadata.requires(project) or ()]
    return list(dict.fromkeys(need for need, _, marker in lines if marker in markers)) or [package]


class FileWord(str):
    """A text of a file that sets options (`spdbench.toml`). `where` names the file and the key, for messages."""

    where: str

    def __new__(cls, text: str, where: str) -> FileWord:
        word = super().__new__(cls, text)
        word.where = where
        return word


def given_by(word: str, option: str) -> str:
    """How a message says where `word` comes from: `option`, as typed, or the file and the key that set it."""
    return f"{word.where}:" if isinstance(word, FileWord) else option


def brief(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def short_repr(value: object) -> str:
    """`repr` of a value from outside, in at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def first_problem(error: ValidationError) -> tuple[tuple[str, ...], str]:
    """The key path of the first thing that pydantic found wrong, and what is wrong with it."""
    first = error.errors()[0]
    return tuple(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")


def validated(model: type[Model], data: object, prefix: str) -> Model:
    """`data`, an object or JSON text, as a `model`.

    Raises:
        InputError: it does not fit; names key and reason behind `prefix`.
    """
    from pydantic import ValidationError  # a slow import, which `--help` does without

    try:
        return model.model_validate_json(data) if isinstance(data, str | bytes) else model.model_validate(data)
    except ValidationError as error:
        loc, reason = first_problem(error)
        key = f"{'.'.join(loc)}: " if loc else ""  # a check of several keys at once names them itself
        raise InputError(f"{prefix}{key}{reason}") from None
