"""Rows of a dataset on the Hugging Face hub, from its parquet files or from the hub's conversion to parquet.

Reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE at the time of the call. If the hub cannot be reached, files come
from the cache; if they are not there either, the source is unavailable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spdbench import hub
from spdbench.errors import brief, install_command
from spdbench.output_files import write_failure
from spdbench.prompts.rows import SourceUnavailable
from spdbench.prompts.tables import parquet_rows

CONVERTED = "refs/convert/parquet"
DEFAULT_FOLDER = "data"
"""The folder in which the hub's own tools put the parquet files of the config called `default`."""

PARQUET_NAME = re.compile(
    r"(?:(?P<config>[^/]+)/)?(?P<split>[^/-]+)(?:/\d+|-\d+-of-(?P<shards>\d+)(?:-\w+)?)?\.parquet", re.ASCII
)


def read_dataset(
    repo: str, config: str | None, split: str, revision: str | None, columns: Sequence[str]
) -> tuple[list[Mapping[str, Any]], str]:
    """Rows with `columns` of one split, and the commit that they come from.

    Raises:
        SourceUnavailable: no `hub` extra, no hub, no such dataset, config or split.
        InputError: a column that the dataset does not have, or a file that is not parquet.
    """
    try:
        import huggingface_hub  # noqa: F401 - the functions below import what they need of it
        import pyarrow  # noqa: F401 - so does the reader
    except ImportError as error:
        raise SourceUnavailable(
            f"needs huggingface_hub and pyarrow ({error})", install_command("spdbench[hub]")
        ) from None
    rows: list[Mapping[str, Any]] = []
    files = _fetch(repo, config, split, revision)
    for file in files:
        rows += parquet_rows(file, f"hub {repo} {file.name}", columns)
    return rows, _snapshot_of(files[0]).name


def _fetch(repo: str, config: str | None, split: str, revision: str | None) -> list[Path]:
    """Local copies of the split's parquet files, in order: from the hub, else from the cache of an earlier run."""
    from huggingface_hub import constants

    revisions = (revision,) if revision else ("main", CONVERTED)
    command = f"hf download --repo-type dataset {repo}"
    reason = "HF_HUB_OFFLINE is set, and the cache does not hold it"
    if not hub.offline():
        found: list[str] = []
        try:
            for name in revisions:
                files = _download(repo, config, split, name, found)
                if files:
                    return files
            present = f"; it has {', '.join(sorted(set(found)))}" if found else ""
            reason = f"no parquet files for {config or 'default'}/{split}{present}"
        except Exception as error:  # of the client or its HTTP library, whose classes differ between versions
            reason = f"{brief(error)} (the hub at {hub.endpoint() or constants.ENDPOINT}){hub.advice(error)}"
            if full := write_failure(error, behind=True):
                reason = hub.full_cache(full)
    for name in revisions:
        files = _cached(repo, config, split, name)
        if files:
            return files
    raise SourceUnavailable(reason, command)


def _download(repo: str, config: str | None, split: str, revision: str, found: list[str]) -> list[Path]:
    """Local copies of the split's files at `revision`; empty if it has none. Adds every config/split to `found`."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    api = HfApi(endpoint=hub.endpoint())
    try:
        info = api.dataset_info(repo, revision=revision, timeout=hub.TIMEOUT_S)
    except RevisionNotFoundError:
        if revision != CONVERTED:
            raise
        return []
    splits = parquet_splits([sibling.rfilename for sibling in info.siblings or []])
    found += [f"{name}/{part}" for name, part in splits]
    return [
        Path(
            hf_hub_download(
                repo,
                name,
                repo_type="dataset",
                revision=revision,
                endpoint=hub.endpoint(),
                cache_dir=hub.cache_folder(),
                etag_timeout=hub.TIMEOUT_S,
            )
        )
        for name in choose_files(splits, config, split)
    ]


def _cached(repo: str, config: str | None, split: str, revision: str) -> list[Path]:
    """The split's files in the cache; empty unless all of its shards are there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, local_files_only=True, cache_dir=hub.cache_folder()
            )
        )
    except Exception:  # the client has several exceptions for what is not in the cache
        return []
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    chosen = choose_files(parquet_splits(names), config, split)
    match = PARQUET_NAME.fullmatch(chosen[0]) if chosen else None
    whole = match is not None and int(match["shards"] or len(chosen)) == len(chosen)
    return [folder / name for name in chosen] if whole else []


def parquet_splits(names: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """(config, split) -> its files among `names`, sorted; ignores other files."""
    splits: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        match = PARQUET_NAME.fullmatch(name)
        if match:
            config = match["config"]
            key = ("default" if config in (None, DEFAULT_FOLDER) else config, match["split"])
            splits.setdefault(key, []).append(name)
    return splits


def choose_files(splits: Mapping[tuple[str, str], list[str]], config: str | None, split: str) -> list[str]:
    """The files of `config`; if it is None, those of `default` or of the only config that has `split`."""
    if config is not None:
        return splits.get((config, split), [])
    holders = [name for name, part in splits if part == split]
    name = holders[0] if len(holders) == 1 else "default"
    return splits.get((name, split), [])


def _snapshot_of(file: Path) -> Path:
    """The folder `.../snapshots/COMMIT` that a cached file lies in."""
    return next(folder for folder in file.parents if folder.parent.name == "snapshots")
