"""All that spdbench uses of transformers: config, tokenizer, rotary frequencies, GGUF conversion;
for models that our own layers do not support, the models themselves and their caches; and its `generate`, as a peer.

Kept narrow and in one place because these interfaces change within a major version. No other module imports them.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spdbench.errors import InputError, first_line
from spdbench.models.checkpoints.fast_tokenizer import TokenizerFacts
from spdbench.models.checkpoints.gguf_file import GGUFFile, parameter_names, read_gguf
from spdbench.models.rotary import plain_frequencies
from spdbench.models.torch_utils import require_finite
from spdbench.types import GenerationRequest

TOKENIZER_METHODS = (
    *("__call__", "encode", "decode", "apply_chat_template", "get_chat_template", "convert_ids_to_tokens"),
    *("_encode_plus", "_decode", "added_tokens_decoder", "special_tokens_map", "all_special_ids"),
)
"""What makes ids and texts in `TokenizersBackend`, which a class of its own may do otherwise."""


def standard_config(directory: Path, family: str) -> Any:
    """transformers' config object for a local folder whose `model_type` is `family`.

    Raises:
        InputError: no such architecture (code in a repository is never run), or a config that does not fit it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if family not in CONFIG_MAPPING:
        raise InputError(
            f"{directory}/config.json: model_type {family!r} is not supported: neither spdbench nor this version of "
            "transformers knows it"
        )
    with quiet():
        try:
            return AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers checks fields with libraries of its own
            raise InputError(f"{directory}/config.json: cannot be used ({' '.join(str(error).split())})") from None


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer, from local files only."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a broken tokenizer fails in as many ways as it has files
            raise InputError(f"{directory}: its tokenizer cannot be loaded ({first_line(error)})") from None
    tokenizer.model_max_length = 1 << 62  # the model's config is the limit; the tokenizer would only warn
    return tokenizer


def tokenizer_facts(directory: Path) -> TokenizerFacts | None:
    """What `FastTokenizer` needs to do as the model's tokenizer does; None where that would not be enough: for classes
    with Python code of their own, and for parts that have no JSON."""
    from tokenizers import Tokenizer
    from transformers import TokenizersBackend

    tokenizer = load_tokenizer(directory)
    kind = type(tokenizer)
    if any(getattr(kind, name, None) is not getattr(TokenizersBackend, name) for name in TOKENIZER_METHODS):
        return None
    try:
        backend = tokenizer.backend_tokenizer.to_str()
        if Tokenizer.from_str(backend).to_str() != backend:
            return None
    except Exception:  # parts written in Python; the library has no exception of its own
        return None
    return TokenizerFacts(
        backend=backend,
        special_tokens=dict(tokenizer.special_tokens_map),
        all_special_ids=tuple(tokenizer.all_special_ids),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        chat_template=tokenizer.chat_template or None,
        template_arguments=frozenset(inspect.signature(tokenizer.apply_chat_template).parameters),
        splits_special_tokens=bool(tokenizer.split_special_tokens),
    )


def rotary_frequencies(standard: Any, head_dim: int, rotary_dim: int | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies `[D / 2]` in float32, and the factor on cos and sin (1 except for yarn). Where only the first
    `rotary_dim` numbers of a head are rotated, the frequencies of all other pairs are 0: they keep their values.

    Raises:
        ValueError: a key is missing or has a value that cannot be used.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotated = rotary_dim or head_dim
    try:
        kind = standard.rope_parameters["rope_type"]
        if kind == "default":
            frequencies, factor = plain_frequencies(standard.rope_parameters["rope_theta"], rotated), 1.0
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](standard, torch.device("cpu"))
        good = frequencies.shape == (rotated // 2,) and bool((frequencies.isfinite() & (frequencies > 0)).all())
    except Exception as error:  # each kind of positions raises errors of its own
        raise ValueError(first_line(error)) from None
    if not good:
        raise ValueError("frequencies that are not positive numbers")
    if not 0 < factor < math.inf or (rotated < head_dim and factor != 1.0):
        raise ValueError("an attention factor that is not a positive number, or not 1 for heads rotated in part")
    return torch.nn.functional.pad(frequencies, (0, (head_dim - rotated) // 2)), float(factor)


def scaled_frequencies(parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """`rotary_frequencies` for drafters without a model's config; `parameters` are like a config's `rope_parameters`.

    Raises:
        ValueError: a key is missing or has a value that cannot be used.
    """
    from transformers import LlamaConfig

    with quiet():
        try:
            standard = LlamaConfig(
                hidden_size=head_dim,
                num_attention_heads=1,
                max_position_embeddings=max_positions,
                rope_parameters=dict(parameters),
            )
        except Exception as error:  # transformers checks fields with libraries of its own
            raise ValueError(first_line(error)) from None
        return rotary_frequencies(standard, head_dim)


def require_causal(directory: Path, standard: Any) -> None:
    """Raises `InputError` if transformers has no decoder-only language model for this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    family = standard.model_type
    if standard.is_encoder_decoder:
        raise InputError(
            f"{directory}: {family!r} is not supported: it is an encoder-decoder, not a decoder-only model"
        )
    if type(standard) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{directory}: {family!r} is not supported: it is not a causal language model")


def load_causal_model(directory: Path, standard: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' own model, for inference only, in memory of its own: a mapped file's pages could be dropped in the
    middle of a measurement.

    Raises:
        InputError: it cannot be built, or the weights are not exactly those that the config asks for.
    """
    from transformers import AutoModelForCausalLM

    # Fused attention omits the capping of scores, and older versions of transformers do not warn of it.
    capped = getattr(standard.get_text_config(decoder=True), "attn_logit_softcapping", None)
    with quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(directory),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **({"attn_implementation": "eager"} if capped else {}),
            )
        except Exception as error:  # a model's own code may raise anything
            raise InputError(f"{directory}: cannot be loaded by transformers ({first_line(error)})") from None
    _refuse_other_tensors(str(directory), report, "is config.json the one that belongs to the weights?")
    for name, tensor in model.named_parameters():
        require_finite(str(directory), name, tensor)
    if device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False).to(device)


def _refuse_other_tensors(source: str, report: Mapping[str, Any], question: str) -> None:
    """Raises `InputError` for weights that are not exactly those of the model, by transformers' loading `report`."""
    for key, what in (
        ("missing_keys", "are missing from the weights"),
        ("mismatched_keys", "do not have the shapes that the config gives"),
        ("unexpected_keys", "have no place in this model"),
    ):
        if names := sorted(map(str, report[key])):
            raise InputError(f"{source}: {len(names)} tensors {what}, e.g. {names[0]}; {question}")


def for_generation(model: Any) -> Any:
    """`model` without its own settings for `generate`, so that only ours apply."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    return model


def generation_settings(request: GenerationRequest, **drafting: int) -> Any:
    """How `generate` decodes what `request` asks for: the same warping, in the same order, as `decoding.sampling`."""
    from transformers import GenerationConfig

    sampling = request.sampling
    warping: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        warping = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,  # 0 is off; unset, it would be 50
            "top_p": sampling.top_p,
        }
    return GenerationConfig(
        max_new_tokens=request.max_new_tokens,
        eos_token_id=sorted(request.eos_ids) or None,
        pad_token_id=0,  # unused for one sequence, but its absence is a warning
        **warping,
        **drafting,
    )


def assistant_settings(num_tokens: int | None) -> Any:
    """How an assistant drafts: always `num_tokens` tokens, or by transformers' defaults."""
    from transformers import GenerationConfig

    if num_tokens is None:
        return GenerationConfig()
    return GenerationConfig(
        num_assistant_tokens=num_tokens, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )


def version() -> str:
    import transformers

    return str(transformers.__version__)


def range_cache(layers: range) -> tuple[Any, list[Any]]:
    """An empty cache for a model of which only `layers` run, and the entries of just these.

    Each entry keeps every token, so that it can be rolled back; masks take care of sliding windows. transformers makes
    masks and positions for the length of layer 0, so the layers before the range share the first one's entry.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    slots = [DynamicLayer() for _ in layers]
    cache = DynamicCache()
    cache.layers = [*slots[:1] * layers.start, *slots]
    return cache, slots


def convert_gguf(file: Path, out: Path) -> str:
    """Dequantises a GGUF file to float32 safetensors with its tokenizer, in the folder `out`. Returns what a user
    should know of its ids each time, else an empty text.

    Raises:
        InputError: not a GGUF file, one that transformers cannot read, or one of which it uses only a part.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations import GGUF_CONFIG_MAPPING

    header = read_gguf(file)
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no setting
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        except Exception as error:  # readers of broken files raise errors of any type
            raise InputError(f"{file}: cannot be converted ({first_line(error)})") from error
    _refuse_other_tensors(str(file), report, "is it a part of a model?")
    header.set_pre_tokenizer(tokenizer)
    config = model.config
    if scaling := header.rope_parameters() or _factors_as_llama3(header, config):
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)  # with windows: by kind of layer
        rope.update(scaling)
    state = model.state_dict()
    total = sum({tensor.data_ptr(): tensor.numel() for tensor in state.values()}.values())  # tied ones count once
    family = next((name for name in (header.architecture, config.model_type) if name in GGUF_CONFIG_MAPPING), None)
    keys = set(GGUF_CONFIG_MAPPING[family]) - {"rope.dimension_count"} if family else set(header.values)
    header.refuse_unused(parameter_names(header.architecture, config.num_hidden_layers, state), total, keys, config)
    if len(header.end_ids) != 1:  # without any, the architecture's default would be a token of another vocabulary
        config.eos_token_id = model.generation_config.eos_token_id = list(header.end_ids) or None
    with quiet():
        # The weights are plain floats now; transformers refuses to save a model that it considers quantised.
        model.is_quantized, model.hf_quantizer = False, None
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
    return header.note


def _factors_as_llama3(header: GGUFFile, config: Any) -> dict[str, Any] | None:
    """The scaling of Llama 3.1 and later, which GGUF files state as a divisor of each frequency; None if there is none.

    Its published parameters are recognised by their factors, of which the largest is the scaling's own; raises
    `InputError` for others.
    """
    factors = header.rope_factors
    if factors is None or set(factors) == {1.0}:
        return None
    head_dim, theta = 2 * len(factors), config.rope_parameters.get("rope_theta", 1e4)
    with contextlib.suppress(ValueError, OverflowError):  # also of factors that are not finite
        scaling = {
            "rope_type": "llama3",
            "factor": float(round(max(factors))),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        found, _ = scaled_frequencies({"rope_theta": theta, **scaling}, head_dim, 8192)
        if torch.allclose(found, plain_frequencies(theta, head_dim) / torch.tensor(factors), rtol=1e-4):
            return scaling
    raise header.error("rope_freqs.weight scales rotary positions in a way that the conversion cannot apply")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings: our own messages say what matters."""
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
