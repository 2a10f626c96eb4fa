"""From an EAGLE head as read to weights that fit a target.

What published heads leave open (which features, which rotary positions, what is fed back) is the user's answer where
one is given, else the file's, else what the method's authors do.
Tensors' shapes say how large a head is, its config only where shapes leave a choice; a config that says otherwise than
the tensors is an error, as one of the two is not this head's. Source: published heads.

Shapes: T target width, M draft width, A aux features, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.models.checkpoints.config import ROPE_TYPES, ModelConfig
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, Shape, dense_layer, geometry_of
from spdbench.models.decoder import Decoder
from spdbench.models.hf.library import scaled_frequencies
from spdbench.models.layer_ops import Geometry
from spdbench.models.rotary import Rotary, plain_frequencies
from spdbench_backends.drafter_files.tensors import (
    TargetTensors,
    draft_vocabulary,
    mapped_ids,
    random_tensors,
    require_target,
)
from spdbench_backends.eagle.belonging import without_padding
from spdbench_backends.eagle.formats import EagleConfig, EagleFile
from spdbench_backends.eagle.head import EagleWeights

AuxConvention = Literal["auto", "hidden_states", "layer_output"]
NormOutput = Literal["auto", "feed", "ignore"]

QUERY, KEY = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"
QUERY_NORM = "layers.0.self_attn.q_norm.weight"
GATE = "layers.0.mlp.gate_proj.weight"


@dataclass(frozen=True)
class Sizes:
    """Of a head: its width, the columns of `fc`, how its attention is cut, its feed-forward width, its layers."""

    width: int
    fused: int
    geometry: Geometry
    ffn: int
    num_layers: int


def build_eagle(
    file: EagleFile,
    target: Decoder,
    aux_convention: AuxConvention = "auto",
    rope_theta: float | None = None,
    norm_output: NormOutput = "auto",
) -> EagleWeights:
    """The head for `target`.

    Raises:
        InputError: made for another hidden size, vocabulary or family; a tensor is unknown, missing or misshapen; a
            convention is ambiguous and not given.
    """
    file = without_padding(file, target)
    config, base, eagle3, sizes = file.config, target.config, file.is_eagle3, sizes_of(file)
    wide = config.target_hidden_size if eagle3 else None
    size = ("the hidden size of fc.weight", sizes.width) if wide is None else ("config.target_hidden_size", wide)
    require_target(
        file,
        (*size, base.hidden_size),
        ("config.vocab_size", config.vocab_size, base.vocab_size),
        ("config's target family", config.target_family, base.family),
    )
    num_aux = _num_aux(file, sizes, base)
    file, vocabulary = _draft_vocabulary(file, target)
    for name, of_target in (("embed_tokens.weight", "embedding"), ("lm_head.weight", "head")):
        if name not in file.tensors and sizes.width != base.hidden_size:
            raise file.error(f"tensor {name} is missing, and the target's {of_target} is of another width")
    of_all = "input_norm.weight" in file.tensors  # one norm over all features, or one for each
    norms = ["input_norm.weight"] if of_all else [f"fc_norm.{index}.weight" for index in range(num_aux)]
    norm_shapes = dict.fromkeys(norms if eagle3 else (), (sizes.fused if of_all else base.hidden_size,))
    tensors = _checked_tensors(file, sizes, target, vocabulary, norm_shapes)
    # SpecForge's `norm_output` names the norm that every head has; elsewhere it says what the next row is fed.
    feed_normed = norm_output == "feed" or (norm_output == "auto" and config.norm_output and file.layout != "specforge")
    embeddings = tensors.get("embed_tokens.weight", target.embeddings_VM)
    assert embeddings is not None
    return EagleWeights(
        geometry=sizes.geometry,
        rotary=rotary_of(file, sizes.geometry.head_dim, rope_theta, target),
        width=sizes.width,
        dtype=target.dtype,
        device=target.device,
        embeddings=embeddings,
        aux=aux_states(file, num_aux, base.num_layers, aux_convention) if eagle3 else (),
        fc=tensors.linear("fc."),
        fc_norms=tuple(norm for norm in map(tensors.norm, norms) if norm is not None),
        layers=tuple(
            dense_layer(tensors.get, f"layers.{index}.", config.sliding_window) for index in range(sizes.num_layers)
        ),
        feature_norm=tensors.norm("layers.0.hidden_norm.weight"),
        norm=tensors.norm("norm.weight"),
        head=tensors.head("lm_head.weight", vocabulary),
        vocabulary=vocabulary,
        residual_normed=eagle3 and config.norm_before_residual,
        feed_normed=eagle3 and feed_normed,
    )


def _checked_tensors(
    file: EagleFile, sizes: Sizes, target: Decoder, vocabulary: DraftVocabulary, norm_shapes: Mapping[str, Shape]
) -> TargetTensors:
    """The head's tensors; `norm_shapes` are those of the norms before `fc`, which it may have."""
    expected = _expected(sizes, file.is_eagle3, target.config)
    expected.add(norm_shapes, optional=True)
    # Where a published head of the whole vocabulary has no output head, its authors share the target's.
    own_head_is_optional = not file.is_eagle3 or file.layout == "spdbench" or vocabulary.token_ids_U is None
    expected.add({"lm_head.weight": (vocabulary.size, sizes.width)}, optional=own_head_is_optional)
    return TargetTensors(file, expected, target)


def _num_aux(file: EagleFile, sizes: Sizes, base: ModelConfig) -> int:
    """How many of the target's features `fc` reads in EAGLE-3."""
    width = base.hidden_size
    if file.is_eagle3 and sizes.fused % width:
        raise file.error(f"tensor fc.weight has {sizes.fused} columns, expected a multiple of {width}")
    if not file.is_eagle3 and sizes.fused != 2 * width:
        raise file.error(f"tensor fc.weight has {sizes.fused} columns, expected {2 * width}")
    return sizes.fused // width if file.is_eagle3 else 0


def _draft_vocabulary(file: EagleFile, target: Decoder) -> tuple[EagleFile, DraftVocabulary]:
    """The draft vocabulary, and the file without the tensors that list it."""
    ids, size, source = file.config.draft_token_ids, file.config.draft_vocab_size, "config.draft_token_ids"
    if ids is None:
        found, source = mapped_ids(file, target.config.vocab_size), "the pair of d2t and t2d"
        if found is not None and not file.is_eagle3:
            raise file.error("has a draft vocabulary (tensor d2t), which EAGLE-1 does not know")
        ids = None if found is None else tuple(found)
        tensors = {name: tensor for name, tensor in file.tensors.items() if name not in ("d2t", "t2d")}
        padded, head = file.tensors.get("d2t"), tensors.get("lm_head.weight")
        if ids is not None and padded is not None and len(ids) < len(padded):  # as many rows of the head are padding
            if head is not None and len(head) == len(padded):
                tensors["lm_head.weight"] = head[: len(ids)]
            size = len(ids) if size == len(padded) else size
        file = replace(file, tensors=tensors)
    return file, draft_vocabulary(file, ids, target, size=size, source=source)


def _expected(sizes: Sizes, eagle3: bool, base: ModelConfig) -> ExpectedTensors:
    """The tensors of a head but for the norms before `fc` and the output head."""
    width, expected = sizes.width, ExpectedTensors()
    expected.add({"fc.weight": (width, sizes.fused)})
    expected.add({"fc.bias": (width,)}, optional=True)
    for index in range(sizes.num_layers):
        inputs = 2 * width if eagle3 and index == 0 else width
        prefix, input_norm = f"layers.{index}.", eagle3 or index > 0
        expected.add_layer(prefix, sizes.geometry, width, sizes.ffn, inputs=inputs, input_norm=input_norm)
    if eagle3:
        expected.add({"layers.0.hidden_norm.weight": (width,), "norm.weight": (width,)})
    expected.add({"embed_tokens.weight": (base.vocab_size, width)}, optional=True)
    return expected


def sizes_of(file: EagleFile) -> Sizes:
    """The sizes of a head.

    Raises:
        InputError: a tensor that they follow from is missing or misshapen, or the config contradicts it.
    """
    config, eagle3 = file.config, file.is_eagle3
    (width, fused), (ffn, _) = _matrix(file, "fc.weight"), _matrix(file, GATE)
    layers = [name.split(".")[1] for name in file.tensors if name.startswith("layers.")]
    # A gap between layers shows as missing tensors. No more layers than tensors: a damaged name may hold any number.
    num_layers = min(1 + max((int(index) for index in layers if index.isdecimal()), default=0), len(file.tensors))
    _require_same(file, "hidden_size", config.hidden_size, width, "fc.weight")
    _require_same(file, "intermediate_size", config.intermediate_size, ffn, GATE)
    if file.layout != "safeailab" or not eagle3:  # whose EAGLE-3 has one layer whatever the config says
        _require_same(file, "num_hidden_layers", config.num_hidden_layers, num_layers, f"layers.{num_layers - 1}")
    for key, stated, name in (
        ("bias", None if eagle3 else config.bias, "fc.bias"),
        ("norm_before_fc", config.norm_before_fc, "input_norm.weight"),
        ("fc_norm", config.fc_norm, "fc_norm.0.weight"),
    ):
        if stated is not None and stated != (name in file.tensors):
            found = "missing" if stated else "there"
            raise file.error(f"config.{key} is {str(stated).lower()}, but tensor {name} is {found}")
    return Sizes(width, fused, _geometry(file), ffn, num_layers)


def _geometry(file: EagleFile) -> Geometry:
    config = file.config
    queries, keys = _matrix(file, QUERY)[0], _matrix(file, KEY)[0]
    head_dim, norm = config.head_dim, file.tensors.get(QUERY_NORM)
    if norm is not None and norm.dim() == 1:
        _require_same(file, "head_dim", head_dim, len(norm), QUERY_NORM)
        head_dim = len(norm)
    if head_dim is None:
        if config.num_attention_heads is None:
            raise file.error("its config has neither num_attention_heads nor head_dim")
        head_dim, left = divmod(queries, config.num_attention_heads)
        if left:
            raise file.error(
                f"config.num_attention_heads is {config.num_attention_heads}, but tensor {QUERY} has {queries} rows"
            )
    for name, rows in ((QUERY, queries), (KEY, keys)):
        if head_dim < 2 or head_dim % 2 or rows % head_dim:
            raise file.error(f"tensor {name} has {rows} rows, which makes no heads of {head_dim}")
    heads, kv_heads = queries // head_dim, keys // head_dim
    _require_same(file, "num_attention_heads", config.num_attention_heads, heads, QUERY)
    _require_same(file, "num_key_value_heads", config.num_key_value_heads, kv_heads, KEY)
    if heads % kv_heads:
        raise file.error(f"tensor {KEY} has {kv_heads} heads, which do not divide the {heads} of {QUERY}")
    return Geometry(heads, kv_heads, head_dim, config.rms_norm_eps)


def _matrix(file: EagleFile, name: str) -> tuple[int, int]:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise file.error(f"tensor {name} is missing")
    if tensor.dim() != 2 or not tensor.numel():
        raise file.error(f"tensor {name} has shape {list(tensor.shape)}, expected a matrix")
    rows, columns = tensor.shape
    return rows, columns


def _require_same(file: EagleFile, key: str, stated: int | None, found: int, name: str) -> None:
    if stated is not None and stated != found:
        raise file.error(f"config.{key} is {stated}, but tensor {name} makes it {found}")


def default_aux(num_layers: int) -> tuple[int, ...]:
    """The hidden states that EAGLE-3 reads unless a head says otherwise: near the first layer, the middle, the last."""
    return (2, num_layers // 2, num_layers - 3)


def aux_states(file: EagleFile, num_aux: int, num_layers: int, convention: AuxConvention) -> tuple[int, ...]:
    """The target's hidden states that the head reads. Published configs count them in two ways.

    Raises:
        InputError: the config does not say which, or its ids could mean either.
    """
    ids, standard = file.config.aux_hidden_states, default_aux(num_layers)
    if ids is None:
        if num_aux != len(standard):
            raise file.error(f"reads {num_aux} auxiliary features, and its config does not say which")
        ids, convention = standard, "hidden_states"
    if len(ids) != num_aux:
        raise file.error(f"config names {len(ids)} auxiliary layers, but fc.weight reads {num_aux}")
    if file.layout == "spdbench":
        convention = "hidden_states"
    if convention == "auto":
        if ids not in (standard, tuple(index - 1 for index in standard)):
            raise file.error(
                f"config names the auxiliary layers {list(ids)}, which may count hidden states or layers' outputs; "
                "say -o eagle.aux_convention=hidden_states or layer_output (try both: the right one drafts better)"
            )
        convention = "hidden_states" if ids == standard else "layer_output"
    found = ids if convention == "hidden_states" else tuple(index + 1 for index in ids)
    if not all(0 <= index <= num_layers for index in found):
        raise file.error(f"config names the auxiliary layers {list(ids)}, but the target has {num_layers} layers")
    return found


def rotary_of(file: EagleFile, head_dim: int, theta: float | None, target: Decoder) -> Rotary:
    """The head's rotary positions; plain ones with base `theta` where it is given.

    Raises:
        InputError: of a kind that is not computed here, or described wrongly.
    """
    config = file.config
    if theta is None and config.rope_scaling is not None:
        kind = config.rope_scaling["rope_type"]
        if kind not in ROPE_TYPES:
            raise file.error(
                f"config's rotary positions are of type {kind}. Supported: {', '.join(ROPE_TYPES)}; "
                "-o eagle.rope_theta=BASE takes plain ones"
            )
        try:
            parameters = {**config.rope_scaling, "rope_theta": config.rope_theta}
            scaled = scaled_frequencies(parameters, head_dim, config.max_position_embeddings)
        except ValueError as error:
            raise file.error(f"config's rotary positions of type {kind} cannot be used ({error})") from None
        return Rotary(*scaled, target.dtype, target.device)
    plain = plain_frequencies(config.rope_theta if theta is None else theta, head_dim)
    return Rotary(plain, 1.0, target.dtype, target.device)


def random_eagle(target: Decoder, seed: int, version: Literal[1, 3] = 3) -> EagleFile:
    """An untrained head of the target's sizes: matrices drawn from N(0, 0.02²), norms of ones, the target's head."""
    base, eagle3 = target.config, version == 3
    width, num_aux = base.hidden_size, 3 if eagle3 else 0
    sizes = Sizes(width, width * (num_aux or 2), geometry_of(base), base.intermediate_size, 1)
    aux = tuple(min(max(index, 0), base.num_layers) for index in default_aux(base.num_layers))
    config = EagleConfig(
        num_attention_heads=base.num_heads,
        num_key_value_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        hidden_size=width,
        intermediate_size=base.intermediate_size,
        vocab_size=base.vocab_size,
        rms_norm_eps=base.norm_eps,
        aux_hidden_states=aux if eagle3 else None,
        trained_tokens=0,
    )
    expected = _expected(sizes, eagle3, base)
    return EagleFile(Path("random"), "spdbench", config, random_tensors(expected.required, seed))
