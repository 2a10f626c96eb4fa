"""Training data that the target writes itself: conversations, the batches that compute them, and what is kept out."""
