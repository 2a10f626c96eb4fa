"""Target models: weights, forward by layer range, KV cache, stage split."""
