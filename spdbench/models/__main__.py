"""`python -m spdbench.models` makes the embedded model ready ahead of time: fetched, converted, in the cache."""

from spdbench.models.checkpoints.embedded import NAME
from spdbench.models.checkpoints.find_model import find_model

if __name__ == "__main__":
    print(f"{NAME} is ready: {find_model(NAME).directory}")
