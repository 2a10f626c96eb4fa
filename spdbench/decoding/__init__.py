"""What every method shares: sampling, verification, the autoregressive loop."""
