"""What spdbench uses of transformers and the hub."""
