"""Decoding on a CPU: weights packed once, kernels compiled by numba, and the threads that share them."""
