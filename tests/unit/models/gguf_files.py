"""Small GGUF files: a llama of random numbers, with whatever else a test needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN = 24, 3, 1, 8, 40
TOKENS = ["<end>", "<turn>", "<message>", *(chr(97 + i) for i in range(26)), "ab"]


def write_gguf(
    path: Path,
    layers: int = 3,
    rope_base: float = 10000.0,
    without: Callable[[str], bool] = lambda _: False,
    extra: dict[str, Any] | None = None,
    about: Callable[[GGUFWriter], object] = lambda _: None,
    vocabulary: int = len(TOKENS),
) -> Path:
    """A llama of random numbers; `without` leaves tensors out, `extra` adds some, `about` adds metadata."""
    generator = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(layers):
        block = f"blk.{layer}."
        shapes |= {
            f"{block}attn_norm.weight": (WIDTH,),
            f"{block}attn_q.weight": (HEADS * HEAD_DIM, WIDTH),
            f"{block}attn_k.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{block}attn_v.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{block}attn_output.weight": (WIDTH, HEADS * HEAD_DIM),
            f"{block}ffn_norm.weight": (WIDTH,),
            f"{block}ffn_gate.weight": (FFN, WIDTH),
            f"{block}ffn_up.weight": (FFN, WIDTH),
            f"{block}ffn_down.weight": (WIDTH, FFN),
        }
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * 27)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    about(writer)
    for name, shape in shapes.items():
        if not without(name):
            writer.add_tensor(name, generator.standard_normal(shape).astype(np.float32))
    for name, numbers in (extra or {}).items():
        writer.add_tensor(name, np.asarray(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary_gguf(path: Path, about: Callable[[GGUFWriter], object]) -> Path:
    """A llama whose embedding has as many rows as `about` gives it tokens."""
    sizes: list[int] = []

    def counted(writer: GGUFWriter) -> None:
        about(writer)
        sizes.append(len(writer.kv_data[0]["tokenizer.ggml.tokens"].value))

    write_gguf(path, about=counted)
    return write_gguf(path, about=about, vocabulary=sizes[0])
