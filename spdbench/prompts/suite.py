"""A suite file (YAML) as a `Suite`: prompts, their decoding, and their source.

Checks everything that a user may write wrongly; errors name file, key and value. Importing this loads no hub code.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag, ValidationError

from spdbench.errors import InputError, did_you_mean
from spdbench.input_files import parse_yaml, read_input
from spdbench.prompts.rows import Part, Row, SourceUnavailable, Text, problem
from spdbench.prompts.source import PLACEHOLDER, Place, Source, Template
from spdbench.prompts.sources import SOURCES, HubSource, InlineSource, LmEvalSource, PackageSource, PathSource
from spdbench.prompts.text_source import TextSource
from spdbench.types import Message, Prompt

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SHIPPED_IN = "spdbench_suites"
DATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".gz")
Judge = Literal["gsm8k", "gsm8k_strict", "humaneval"]
"""Ways to score answers; see judge/score.py."""


class Decoding(Part):
    """A suite's decoding options, which the command line overrides. Temperature 0 is greedy."""

    max_new_tokens: int = Field(256, ge=1, le=2**31 - 1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0: not limited")
    seed: int = Field(0, ge=0, le=2**63 - 1)


@dataclass(frozen=True)
class Suite:
    """Prompts to measure, after the suite's own template and limit. `sha256` is that of the YAML file's bytes.

    `source` is the title of the source that was used. `model` is the suite's own target, `score` the way to score
    answers, for all or by category. `missing` says why prompts lack the references that another source has. With
    `omit_too_long`, prompts for which a model has no room are left out.
    """

    name: str
    version: int
    description: str
    sha256: str
    source: str
    model: str | None
    prompts: tuple[Prompt, ...]
    decoding: Decoding
    score: str | Mapping[str, str] | None
    missing: str = ""
    omit_too_long: bool = False


@dataclass(frozen=True)
class SuiteListing:
    """A shipped suite as its file describes it. `num_prompts` is None if only the source has the number."""

    name: str
    description: str
    sources: tuple[str, ...]
    num_prompts: int | None


def _kind(entry: object) -> str | None:
    kinds = [kind for kind in SOURCES if isinstance(entry, dict) and kind in entry]
    return kinds[0] if len(kinds) == 1 else None


_AnySource = Annotated[
    Annotated[PathSource, Tag("path")]
    | Annotated[PackageSource, Tag("package")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[LmEvalSource, Tag("lm_eval")]
    | Annotated[InlineSource, Tag("inline")]
    | Annotated[TextSource, Tag("text")],
    Discriminator(
        _kind,
        custom_error_type="source_kind",
        custom_error_message=f"must be a mapping with exactly one of the keys {', '.join(SOURCES)}",
    ),
]


_Score = Annotated[
    Annotated[Judge, Tag("all")] | Annotated[dict[Text, Judge], Tag("by category")],
    Discriminator(lambda value: "by category" if isinstance(value, Mapping) else "all"),
]


class _Example(Part):
    """A question with its answer, put before each conversation's first question."""

    prompt: Text
    answer: Text


class _Prompts(Part):
    source: list[_AnySource] = Field(min_length=1)
    template: Template | None = None
    system: Text | None = Field(None, description="a system prompt for every conversation that has none of its own")
    examples: list[_Example] = Field(
        [], description="few-shot: questions with answers, which each conversation begins with"
    )
    omit_too_long: bool = Field(False, description="leave out prompts that the model's context has no room for")
    limit: int | None = Field(None, ge=1)
    category: Text | None = Field(None, description="of prompts whose source names none; default: the suite's name")


class _SuiteFile(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*$", description="goes into file names")
    version: int = Field(ge=1, le=2**31 - 1)
    description: str = ""
    model: Text | None = None
    prompts: _Prompts
    decoding: Decoding = Decoding()
    score: _Score | None = None

    def is_unjudged(self, category: str) -> bool:
        return self.score is None or (isinstance(self.score, Mapping) and category not in self.score)


def shipped_suites() -> dict[str, Path]:
    """The suites that come with spdbench, by name."""
    folder = Path(str(importlib.resources.files(SHIPPED_IN)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def list_suites() -> tuple[SuiteListing, ...]:
    """The shipped suites, from their files alone: no source is opened."""
    return tuple(_listing(_read(path)[0]) for path in shipped_suites().values())


def load_suite(name_or_path: str, data: Path | None, *, may_run_code: bool = False) -> Suite:
    """The suite of that name or in that file, with the prompts of the first source that is present.

    Relative paths of sources start from `data`, else from the suite file's folder. `may_run_code` is the user's
    permission to run code of task files that the suite names.

    Raises:
        InputError: no such suite, a mistake in its file or in its data, or none of its sources is present.
    """
    path = _find(name_or_path)
    _require_folder(data)
    file, sha256 = _read(path)
    place = Place(
        name_or_path,
        path.parent if data is None else data,
        file.prompts.category or file.name,
        file.is_unjudged,
        may_run_code,
    )
    prompts, source, missing = _first_present(file.prompts, place, path)
    return Suite(
        name=file.name,
        version=file.version,
        description=file.description,
        sha256=sha256,
        source=source,
        model=file.model,
        prompts=limit_prompts(prompts, file.prompts.limit),
        decoding=file.decoding,
        score=file.score,
        missing=missing,
        omit_too_long=file.prompts.omit_too_long,
    )


def prompts_at_hand(data: Path | None) -> dict[str, tuple[Prompt, ...]]:
    """Prompts of each shipped suite from all of its sources that are on this machine, unlimited, without the network.

    Raises:
        InputError: `data` is not a folder, or a source is present but broken.
    """
    _require_folder(data)
    found: dict[str, tuple[Prompt, ...]] = {}
    for name, path in shipped_suites().items():
        file, _ = _read(path)
        place = Place(name, path.parent if data is None else data, name)
        for source in file.prompts.source:
            if source.kind in ("inline", "path", "package"):
                with suppress(SourceUnavailable):
                    found[name] = found.get(name, ()) + source.load(place).prompts
    return found


def limit_prompts(prompts: tuple[Prompt, ...], limit: int | None) -> tuple[Prompt, ...]:
    """The first `limit` conversations, round-robin over categories; all of them unchanged if `limit` is None.

    Categories come in order of first appearance. The result keeps the round-robin order, so the prompts of a smaller
    limit are the first of a larger one's.

    Raises:
        InputError: `limit` is below 1.
    """
    if limit is None:
        return prompts
    if limit < 1:
        raise InputError(f"--limit {limit}: must be 1 or more")
    categories: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        categories.setdefault(prompt.category, []).append(prompt)
    rounds = zip_longest(*categories.values())
    return tuple(prompt for row in rounds for prompt in row if prompt is not None)[:limit]


def _require_folder(data: Path | None) -> None:
    if data is not None and not os.path.isdir(data):
        raise InputError(f"--data {data}: no such folder")


def _find(name_or_path: str) -> Path:
    shipped = shipped_suites()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if os.path.isdir(path):  # `Path.is_dir` raises for some names
        raise InputError(f"{path}: is a folder; a suite is a YAML file")
    if path.suffix.lower() in DATA_SUFFIXES:
        raise InputError(
            f"{path}: is a file of data; a suite is a YAML file that names it, as `prompts: {{source: [{{path: "
            f"{path.name}, prompt: COLUMN}}]}}` does"
        )
    if os.path.exists(path):
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise InputError(f"{path}: no such suite file")
    raise InputError(f"unknown suite '{name_or_path}'{did_you_mean(name_or_path, shipped)} Or a path to a YAML file.")


def _read(path: Path) -> tuple[_SuiteFile, str]:
    """The checked file and the sha256 of its bytes."""
    raw = read_input(path)
    try:
        data = parse_yaml(raw)
    except ValueError as error:
        raise InputError(f"{path}{error}") from None
    if not isinstance(data, dict):
        found = {"NoneType": "nothing", "list": "a list"}.get(type(data).__name__, type(data).__name__)
        raise InputError(
            f"{path}: a suite must be a mapping (name, version, prompts, ...), and this file holds {found}"
        )
    try:
        return _SuiteFile.model_validate(data), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        reasons = [_reason(details) for details in error.errors()]
        raise InputError("\n".join(f"{path}: {reason}" for reason in reasons)) from None


def _reason(details: ErrorDetails) -> str:
    """One mistake with its key path, as in the file; for an unknown key or judge also the known ones."""
    loc, kind, value = details["loc"], details["type"], details["input"]
    # Where pydantic puts the tag of a union into the path, which is not a key of the file.
    tag = 3 if loc[:2] == ("prompts", "source") else 1 if loc[:1] == ("score",) else len(loc)
    key = ".".join(str(part) for part in loc[:tag] + loc[tag + 1 :])
    if kind == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(str(loc[-1]), _model_at(loc[:-1]).model_fields)}"
    if kind == "literal_error" and isinstance(value, str):
        return f"{key}: unknown judge '{value}'{did_you_mean(value, get_args(Judge))}"
    return f"{key}: {problem(details)}"


def _model_at(loc: tuple[int | str, ...]) -> type[Part]:
    match loc:
        case ("prompts",):
            return _Prompts
        case ("prompts", "examples", int()):
            return _Example
        case ("prompts", "source", int(), "path", "references"):
            return PackageSource
        case ("prompts", "source", int(), str() as kind):
            return SOURCES[kind]
        case ("prompts", "source", int(), "inline", "inline", int()):
            return Row
        case ("decoding",):
            return Decoding
    return _SuiteFile


def _first_present(part: _Prompts, place: Place, path: Path) -> tuple[tuple[Prompt, ...], str, str]:
    """The prompts of the first source that is present, wrapped in their template; its title; what it lacks."""
    missing: list[str] = []
    for source in part.source:
        try:
            loaded = source.load(place)
        except SourceUnavailable as error:
            missing.append(f"  {source.title}: {error.reason}\n    to get it: {error.command}")
            continue
        template = source.template or part.template
        examples = _as_messages(part.examples, template)
        prompts = tuple(
            _wrapped(_with_examples(_with_system(prompt, part.system), examples), template) for prompt in loaded.prompts
        )
        return prompts, loaded.title, loaded.missing
    raise InputError("\n".join([f"{path}: none of its prompt sources is there:", *missing]))


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    if system is None or any(message["role"] == "system" for message in prompt.context):
        return prompt
    return replace(prompt, context=({"role": "system", "content": system}, *prompt.context))


def _as_messages(examples: Sequence[_Example], template: str | None) -> tuple[Message, ...]:
    """`examples` as turns, their questions in the suite's template as those of prompts are."""
    found: list[Message] = []
    for each in examples:
        question = each.prompt if template is None else template.replace(PLACEHOLDER, each.prompt)
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": each.answer}]
    return tuple(found)


def _with_examples(prompt: Prompt, examples: tuple[Message, ...]) -> Prompt:
    num_system = sum(message["role"] == "system" for message in prompt.context[:1])
    system, others = prompt.context[:num_system], prompt.context[num_system:]
    return replace(prompt, context=(*system, *examples, *others))


def _wrapped(prompt: Prompt, template: str | None) -> Prompt:
    if template is None:
        return prompt
    return replace(prompt, turns=tuple(template.replace(PLACEHOLDER, turn) for turn in prompt.turns))


def _listing(file: _SuiteFile) -> SuiteListing:
    sources: list[Source] = list(file.prompts.source)
    counts = [len(source.inline) for source in sources[:1] if isinstance(source, InlineSource)]
    counts += [file.prompts.limit] if file.prompts.limit else []
    titles = tuple(source.title for source in sources)
    return SuiteListing(file.name, file.description, titles, min(counts, default=None))
