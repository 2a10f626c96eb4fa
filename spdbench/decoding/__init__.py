"""What the methods share: sampling, trees, verification, and the decoding loops."""
