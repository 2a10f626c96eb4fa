"""`spdbench import`: exports of other load generators in, result files out."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import require_free_output, require_writable, result_path, write_whole_file
from spdbench.cli.options import FOLDER, LABEL, argument, check_name, complete_files, flag, option, takes
from spdbench.console import counted, say
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.cli.exports.requests import Export
    from spdbench.judge.results.schema import BackendRecord, Result


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Which export is read, and what its results are called."""

    file: str = argument("FILE", shell_complete=complete_files)
    label: str | None = option("--label", None, "LABEL", "What its rows are called. [default: the tool's name]")
    suite: str | None = option("--suite", None, "NAME", "What its prompts are called. [default: the file's name]")
    model: str | None = option("-m --model", None, "MODEL", "What its model is called. [default: as in the export]")
    machine: str | None = option(
        "--machine", None, "NAME", "Where it was measured; times of the same NAME are compared with each other."
    )
    results: Path = option("--results", FOLDER, "DIR", "Where result files go.", Path("results"))
    name: str | None = option("--name", None, "NAME", "Added to the files' names, to tell runs apart.")
    force: bool = flag("--force", "Replace result files that are there.")


@click.command("import", short_help="Read exports of aiperf and guidellm into results.")
@takes(ImportOptions)
def command(options: ImportOptions) -> None:
    """Read exports of other load generators into result files, which `compare` and `check` take as any other.

    FILE is the report of `guidellm run --output kind=json`, or aiperf's profile_export.jsonl.
    """
    from spdbench.cli.exports.formats import read_exports

    source = Path(options.file)
    check_name(options.name)
    for word, value in (("--label", options.label), ("--suite", options.suite)):
        if value is not None and not LABEL.fullmatch(value):
            raise InputError(f"{word} {value}: may hold letters, digits and .+- with single _ between; it names a file")
    exports = read_exports(source)
    require_writable(options.results)
    found = []
    seen = Counter[int]()
    for export in exports:
        result = _result(export, options, source)
        level = f"c{export.at_once}" if len(exports) > 1 or export.at_once > 1 else None
        seen[export.at_once] += 1
        if (again := seen[export.at_once]) > 1:
            level = f"{level}-{again}"
        name = "__".join(filter(None, [options.name, level])) or None
        path = result_path(options.results, result.suite.name, result.backend.label, result.model.id, name)
        require_free_output(path, [source], force=options.force, option="--results")
        found.append((path, result))
    if odd := sum(export.num_odd_drafts for export in exports):
        say(
            f"NOTE: {source}: counts of drafts contradict themselves or the answer in {counted(odd, 'request')}, whose "
            "acceptance is therefore unknown"
        )
    if twice := [f"c{load}" for load, times in seen.items() if times > 1]:
        say(f"NOTE: {source}: several loads had as many requests at once ({', '.join(twice)}); compare them one by one")
    for path, result in found:
        write_whole_file("--results", path, result.model_dump_json(by_alias=True).encode() + b"\n")
        say(f"Wrote {path}: {len(result.runs)} requests, {result.backend.options['concurrency']} at once")


def _result(export: Export, options: ImportOptions, source: Path) -> Result:
    """The export as a result. What it does not say is unknown: token ids, times between tokens, the machine."""
    from spdbench import __version__
    from spdbench.judge.loaded import load
    from spdbench.judge.results.schema import SCHEMA, DecodingInfo, Result, SuiteInfo, Summary, served_model

    model = options.model or Path(export.model).name or "served"
    wrote = f"{export.tool} {export.version}".strip()
    longest = max((run.num_new_tokens for run in export.runs), default=1)
    created = datetime.fromtimestamp(export.created_s, UTC).isoformat(timespec="seconds")
    machine = None if options.machine is None else hashlib.sha256(options.machine.encode()).hexdigest()
    result = Result(
        schema=SCHEMA,
        created=created,
        run_key=hashlib.sha256(f"{wrote}{created}{export.prompts_sha256}".encode()).hexdigest()[:16],
        spdbench={"version": __version__, "git": None},
        suite=SuiteInfo(
            name=options.suite or _plain(source.stem),
            version=1,
            sha256=export.prompts_sha256,
            source=f"an export of {wrote}",
            num_prompts=len({run.prompt_id for run in export.runs}),
        ),
        decoding=DecodingInfo(
            max_new_tokens=export.max_new_tokens or max(1, longest),
            temperature=export.temperature,
            top_p=1.0,
            top_k=0,
            seed=0,
            eos_ids=[],
        ),
        backend=_backend(export, options.label or export.tool, wrote, model),
        model=served_model(model),
        drafter=None,
        environment={"imported_from": wrote, "fingerprint": machine},
        runs=list(export.runs),
        divergence=None,
        summary=Summary(overall={}, by_category={}),
        flags=[],
    )
    loaded = load(result, "")
    by_category = {name: dict(part.metrics) for name, part in loaded.by_category.items()}
    summary = Summary(overall=dict(loaded.metrics), by_category=by_category)
    return result.model_copy(update={"summary": summary, "flags": loaded.flags})


def _backend(export: Export, label: str, wrote: str, model: str) -> BackendRecord:
    """A server of which only times and counts are known."""
    from spdbench.judge.results.schema import BackendRecord

    return BackendRecord(
        name=export.tool,
        label=label,
        kind="draft_verify",
        options={"concurrency": export.at_once},
        devices=["server"],
        num_devices=1,
        lossy=False,
        lanes=1,
        lane_bytes=[0],
        stage_layers=[],
        chosen={"tokens": f"as {wrote} counts them", "prompt": "messages"},
        unknown=["drafts", "forwards", "devices", "ids", "times"],
        other_model=f"{model} in its server",
    )


def _plain(name: str) -> str:
    """`name` as a suite may be called: what no file's name should hold becomes a dash."""
    return re.sub("_+", "_", re.sub("[^A-Za-z0-9_.+-]+", "-", name)).strip("-_") or "export"
