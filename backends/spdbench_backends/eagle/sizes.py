"""How large a head is: told by its tensors' shapes, by the config only where shapes leave a choice.

A config that says otherwise than the tensors is an error: one of them is not this head's. Must not know of targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdbench.models.layer_ops import Geometry
from spdbench_backends.eagle.formats import EagleFile

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


def sizes_of(file: EagleFile) -> Sizes:
    """The sizes of a head.

    Raises:
        InputError: a tensor that tells them is missing or misshapen, or the config contradicts it.
    """
    config = file.config
    width, fused = _matrix(file, "fc.weight")
    ffn, _ = _matrix(file, GATE)
    num_layers = _num_layers(file)
    _agree(file, "hidden_size", config.hidden_size, width, "fc.weight")
    _agree(file, "intermediate_size", config.intermediate_size, ffn, GATE)
    if file.layout != "safeailab" or not file.is_eagle3:  # whose EAGLE-3 has one layer whatever the config says
        _agree(file, "num_hidden_layers", config.num_hidden_layers, num_layers, f"layers.{num_layers - 1}")
    if not file.is_eagle3:
        _agree_on_presence(file, "bias", config.bias, "fc.bias")
    _agree_on_presence(file, "norm_before_fc", config.norm_before_fc, "input_norm.weight")
    _agree_on_presence(file, "fc_norm", config.fc_norm, "fc_norm.0.weight")
    return Sizes(width, fused, _geometry(file), ffn, num_layers)


def _geometry(file: EagleFile) -> Geometry:
    config = file.config
    queries, keys = _matrix(file, QUERY)[0], _matrix(file, KEY)[0]
    head_dim, norm = config.head_dim, file.tensors.get(QUERY_NORM)
    if norm is not None and norm.dim() == 1:
        _agree(file, "head_dim", head_dim, len(norm), QUERY_NORM)
        head_dim = len(norm)
    if head_dim is None:
        if config.num_attention_heads is None:
            raise file.error("its config has neither num_attention_heads nor head_dim")
        if queries % config.num_attention_heads:
            raise file.error(
                f"config.num_attention_heads is {config.num_attention_heads}, but tensor {QUERY} has {queries} rows"
            )
        head_dim = queries // config.num_attention_heads
    for name, rows in ((QUERY, queries), (KEY, keys)):
        if head_dim < 2 or head_dim % 2 or rows % head_dim:
            raise file.error(f"tensor {name} has {rows} rows, which makes no heads of {head_dim}")
    heads, kv_heads = queries // head_dim, keys // head_dim
    _agree(file, "num_attention_heads", config.num_attention_heads, heads, QUERY)
    _agree(file, "num_key_value_heads", config.num_key_value_heads, kv_heads, KEY)
    if heads % kv_heads:
        raise file.error(f"tensor {KEY} has {kv_heads} heads, which do not divide the {heads} of {QUERY}")
    return Geometry(heads, kv_heads, head_dim, config.rms_norm_eps)


def _num_layers(file: EagleFile) -> int:
    """One more than the highest layer that a tensor names; a gap shows as missing tensors."""
    parts = [name.split(".") for name in file.tensors if name.startswith("layers.")]
    return 1 + max((int(index) for _, index, *_ in parts if index.isdecimal()), default=0)


def _matrix(file: EagleFile, name: str) -> tuple[int, int]:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise file.error(f"tensor {name} is missing")
    if tensor.dim() != 2 or not tensor.numel():
        raise file.error(f"tensor {name} has shape {list(tensor.shape)}, expected a matrix")
    rows, columns = tensor.shape
    return rows, columns


def _agree(file: EagleFile, key: str, stated: int | None, found: int, name: str) -> None:
    if stated is not None and stated != found:
        raise file.error(f"config.{key} is {stated}, but tensor {name} makes it {found}")


def _agree_on_presence(file: EagleFile, key: str, stated: bool | None, name: str) -> None:
    if stated is not None and stated != (name in file.tensors):
        raise file.error(
            f"config.{key} is {str(stated).lower()}, but tensor {name} is {'missing' if stated else 'there'}"
        )
