"""What a GGUF file says of itself, and whether its conversion used all of it. No torch.

transformers' reader leaves out tensors and keys that it does not know, and fills tensors that the file lacks with
random numbers. Every tensor and every key of the architecture is therefore used, known to be harmless, or refused by
name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdbench.errors import InputError

END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""The keys of the tokens that end a text, a turn and a message: each of them ends an answer."""
END_TOKENS = frozenset(
    [
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>", "[EOT]", "<end_of_utterance>"),
        *("<|return|>", "<|call|>"),
    ]
)
"""The texts of control tokens that end a turn where no key names them, as in llama.cpp's `llama-vocab.cpp`. What ends a
text, such as `<|endoftext|>`, has a key of its own."""
HARMONY = frozenset(["<|return|>", "<|call|>"])
"""Where a vocabulary has both, `<|end|>` only ends a channel, and the answer goes on."""
CONTROL, USER_DEFINED = 3, 4
SHAPES = frozenset(
    [
        "vocab_size",
        "attention.key_length",
        "attention.value_length",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
    ]
)
"""Keys that only repeat the shapes of tensors, which loading compares with the config."""
NO_ARITHMETIC = frozenset(["tensor_data_layout", "context_length", "nextn_predict_layers"])
"""Keys that change nothing that is computed."""
REQUIRED = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.head_count": "num_attention_heads"}
"""Keys that no tensor's shape tells of and for which transformers has defaults, with their names in a config."""
ROPE_FACTORS = "rope_freqs.weight"
BLOCK = re.compile(r"blk\.(\d+)\.")
TOKENIZER = "tokenizer.ggml."

_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = rf"(?i:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _SIGNS = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS}{_REST}"
_ENDING = rf"(?i:{_SHORT})?"
_GPT4O = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}|{_SIGNS}{_REST}"
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_LLAMA3_NAMES = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"
_NAMES = (
    ("gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling", (_GPT2,)),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b", (r"\p{N}", _GPT2)),
    (f"{_LLAMA3_NAMES} dbrx smaug-bpe chatglm-bpe glm4", (_LLAMA3,)),
    ("qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan grok-2", (_QWEN2,)),
    ("qwen35", (_QWEN35,)),
    ("tekken", (_TEKKEN,)),
    ("gpt-4o llama4 minimax-m2", (_GPT4O,)),
    ("bloom poro-chat gpt3-finnish", (_BLOOM,)),
    ("viking", (_BLOOM, r"\p{N}")),
    ("falcon", (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9]{3}")),
    ("default", (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
)
PRE_TOKENIZERS = {name: patterns for names, patterns in _NAMES for name in names.split()}
"""Into what a text is cut before its pieces become tokens, by the name in `tokenizer.ggml.pre`: what matches the first
pattern, and what lies between, is cut by the next one. As llama.cpp's `llama-vocab.cpp` reads these names."""
WHOLE_WORDS = frozenset([*_LLAMA3_NAMES.split(), "tekken"])
"""Names of tokenizers that take a piece that is a token as it is, and begin texts with BOS unless the file says
otherwise."""


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's header. `values` are the keys of its architecture, without that prefix; `tensors` its tensors'
    numbers of elements; `end_ids` the tokens that end an answer; `rope_factors` the divisors of the frequencies.
    `tokenizer` are the plain values of the keys that begin with `tokenizer.ggml.`, without that."""

    path: Path
    architecture: str
    values: dict[str, Any]
    tensors: dict[str, int]
    end_ids: tuple[int, ...]
    rope_factors: tuple[float, ...] | None
    tokenizer: dict[str, Any]

    @property
    def note(self) -> str:
        """What a user should know of the file's ids; empty if there is nothing."""
        if self.tokenizer.get("model") != "gpt2" or "pre" in self.tokenizer:
            return ""
        return (
            f"{self.path.name} does not say how its tokenizer cuts texts (tokenizer.ggml.pre). They are cut as "
            "llama.cpp does then, and ids may be others than the model was trained with: convert the model again."
        )

    def set_pre_tokenizer(self, tokenizer: Any) -> None:
        """Lets transformers' `tokenizer` of this file cut texts as the file says."""
        from tokenizers import Regex, decoders, pre_tokenizers

        backend, name = tokenizer.backend_tokenizer, self.tokenizer.get("pre", "default")
        if self.tokenizer.get("model") == "gpt2":
            cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
            if name in WHOLE_WORDS:
                backend.model.ignore_merges = True
                if "add_bos_token" not in self.tokenizer and tokenizer.bos_token is not None:
                    tokenizer.add_bos_token = True
        elif self.tokenizer.get("add_space_prefix") is False and isinstance(
            backend.pre_tokenizer, pre_tokenizers.Metaspace
        ):
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
            backend.decoder = decoders.Sequence(
                [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
            )

    def refuse_unused(self, parameters: Mapping[str, str], total: int, used_keys: Collection[str], config: Any) -> None:
        """Refuses a file of which the conversion used only a part.

        `parameters` maps the names in the file that a model can have to its own, `total` is the number of elements of
        the converted model. Some architectures fuse tensors under names that the map does not know, so that names count
        only where the numbers of elements differ. `used_keys` are the keys that made the `config`.

        Raises:
            InputError: names the first tensor or key that was not used, or that is missing.
        """
        extra = {name for name in self.tensors if name not in parameters} - {ROPE_FACTORS}
        blocks = self.values["block_count"] - self.values.get("nextn_predict_layers", 0)
        drafting_blocks = range(blocks, self.values["block_count"])
        drafting = {name for name in extra if (match := BLOCK.match(name)) and int(match[1]) in drafting_blocks}
        extra -= drafting
        stored = sum(size for name, size in self.tensors.items() if name not in drafting and name != ROPE_FACTORS)
        if stored != total:
            names = sorted(extra or self.tensors)
            raise self.error(
                f"{len(extra)} tensors have no place in the converted model, e.g. {names[0]}, so that it would compute "
                "something else"
            )
        for key, name in REQUIRED.items():
            if key not in self.values and getattr(config, name, None) is not None:
                raise self.error(f"{self.architecture}.{key} is missing")
        for key, value in self.values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error(f"{self.architecture}.{key} is {value}, expected a finite number")
            if key not in used_keys and not self._is_harmless(key, value, config):
                raise self.error(f"{self.architecture}.{key} is {value!r}, which the conversion cannot apply")

    def _is_harmless(self, key: str, value: Any, config: Any) -> bool:
        """True if a key that the conversion did not use leaves the arithmetic as `config` has it."""
        if key in SHAPES | NO_ARITHMETIC or key.startswith("rope.scaling."):
            return True  # `rope_parameters` reads the scaling
        rope = getattr(config, "rope_parameters", None) or {}
        if key == "rope.freq_base":
            return bool(value == rope.get("rope_theta"))
        if key == "rope.dimension_count":
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            return bool(value == int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        if key == "attention.causal":
            return value is True
        if key == "attention.scale":  # here 1 is no absence of a scale: it takes the place of 1 / sqrt(head_dim)
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            return isinstance(value, int | float) and (value == 0 or math.isclose(value, head_dim**-0.5, rel_tol=1e-5))
        if (
            key == "attention.sliding_window"
            and isinstance(value, int)
            and value >= self.values.get("context_length", math.inf)
        ):
            return True
        known = getattr(config, key.removeprefix("attention."), None)
        return bool(value == (1 if key.endswith(("scale", "factor")) else 0) or (known is not None and known == value))

    def rope_parameters(self) -> dict[str, Any] | None:
        """The scaling of rotary positions as in a config, without the base; None if there is none.

        Raises:
            InputError: it is of a kind that cannot be applied.
        """
        prefix = "rope.scaling."
        stated = {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}
        factor, original = (stated.get(key) for key in ("factor", "original_context_length"))
        kind = stated.get("type", "linear")  # as in llama.cpp, where a factor may stand alone
        known = {"type", "factor", "original_context_length", "finetuned"}
        if all(key in known or (key == "attn_factor" and value == 1) for key, value in stated.items()):
            if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
                return None
            if isinstance(factor, int | float) and factor > 0:
                found = {"rope_type": kind, "factor": float(factor)}
                if kind == "linear":
                    return found
                if kind == "yarn" and isinstance(original, int) and original > 0:
                    return {**found, "original_max_position_embeddings": original}
        raise self.error(f"it scales rotary positions in a way that the conversion cannot apply ({stated})")

    def error(self, reason: str) -> InputError:
        return InputError(f"{self.path}: {reason}. Give the model's folder or hub id instead.")


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file that holds a whole model.

    Raises:
        InputError: not a GGUF file, a damaged one, or a part of a model.
    """
    from gguf import GGUFReader

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{path}: is not a GGUF file")
    try:
        reader = GGUFReader(path)
        architecture = str(_content(reader, "general.architecture"))
        values = {
            key.removeprefix(architecture + "."): _content(reader, key)
            for key in reader.fields
            if key.startswith(architecture + ".")
        }
        end_ids = [*(_content(reader, TOKENIZER + key) for key in END_KEYS), *_named_end_ids(reader)]
        tokenizer = {
            key.removeprefix(TOKENIZER): _content(reader, key)
            for key, field in reader.fields.items()
            if key.startswith(TOKENIZER) and len(field.types) == 1  # no array
        }
        tokens = _content(reader, TOKENIZER + "tokens") or []
        tensors = {str(tensor.name): int(tensor.n_elements) for tensor in reader.tensors}
        factors = next((tensor.data.tolist() for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
        number, count = _content(reader, "split.no") or 0, _content(reader, "split.count") or 1
    except Exception as error:  # a damaged header raises whatever numpy and struct raise
        raise InputError(f"{path}: is not a whole GGUF file ({type(error).__name__}: {error})") from None
    if count != 1:
        raise InputError(
            f"{path}: is part {number + 1} of {count} of a split model. Join the parts with "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf`, and give the joined file."
        )
    blocks, present = values.get("block_count"), {int(match[1]) for name in tensors if (match := BLOCK.match(name))}
    if not isinstance(blocks, int) or blocks < 1:
        raise InputError(f"{path}: {architecture}.block_count is {blocks!r}, expected at least 1")
    if blocks > len(present):
        raise InputError(
            f"{path}: the tensors of {blocks - len(present)} of {blocks} layers ({architecture}.block_count) are "
            "missing; is it a part of a model?"
        )
    ids = tuple(dict.fromkeys(token for token in end_ids if isinstance(token, int)))
    factors = None if factors is None else tuple(factors)
    found = GGUFFile(path, architecture, values, tensors, ids, factors, tokenizer)
    for key, value in tokenizer.items():
        if key.endswith("_token_id") and not (type(value) is int and 0 <= value < len(tokens)):
            raise found.error(f"{TOKENIZER}{key} is {value!r:.40}, but its vocabulary has {len(tokens)} tokens")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise found.error(f"{TOKENIZER}tokens has {twice!r:.60} more than once, so that ids would be mixed up")
    name = tokenizer.get("pre", "default")
    if tokenizer.get("model") == "gpt2" and name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise found.error(
            f"{TOKENIZER}pre is {name!r:.60}, and how that tokenizer cuts texts is unknown here. Known: {known}"
        )
    return found


def _content(reader: Any, key: str) -> Any:
    """A key's value as Python's; None if the file does not have it."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _named_end_ids(reader: Any) -> list[int]:
    """The control tokens of a file that end an answer by their text alone."""
    tokens, kinds = (_content(reader, TOKENIZER + key) or [] for key in ("tokens", "token_type"))
    found = {
        text: token
        for token, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if text in END_TOKENS and kind in (CONTROL, USER_DEFINED)
    }
    if found.keys() >= HARMONY:
        found.pop("<|end|>", None)
    return list(found.values())


def parameter_names(architecture: str, num_layers: int, names: Collection[str]) -> dict[str, str]:
    """The names in a GGUF file of a model's parameters `names`, each with its own, as far as they are known."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return {}
    known = get_tensor_name_map(arch, num_layers)
    found = {known.get_name(name, try_suffixes=(".weight", ".bias")): name for name in names}
    return {name: own for name, own in found.items() if name is not None}
