"""What starting up loads, and what it remembers: the way to the first prompt must not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from spdbench.models.checkpoint import sha256_of_files

SLOW_TO_IMPORT = {"torch._dynamo", "torch.distributed.tensor", "sympy"}


def test_config_and_tokenizer_load_without_half_of_torch(tiny_model: Path) -> None:
    """transformers checks one field of a config with a module that takes over a second to import."""
    script = (
        "import sys; from pathlib import Path\n"
        "from spdbench.models.hf import load_tokenizer, standard_config\n"
        "standard_config(Path(sys.argv[1])), load_tokenizer(Path(sys.argv[1]))\n"
        f"assert not {SLOW_TO_IMPORT!r} & sys.modules.keys(), {SLOW_TO_IMPORT!r} & sys.modules.keys()\n"
        "from transformers.activations import ACT2FN\n"
        "assert 'silu' in ACT2FN, 'who needs the module gets the real one'\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tiny_model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_is_hashed_once(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("weights")
    known = sha256_of_files([file])
    memo = own_cache / "hashes.json"
    memo.write_text(memo.read_text().replace(known, "f" * 64))
    assert sha256_of_files([file]) == "f" * 64


def test_hashes_of_files_that_are_gone_are_forgotten(own_cache: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("gone", "here", "new")]
    for file in files:
        file.write_text(file.name)
    sha256_of_files(files[:2])
    sha256_of_files(files[1:2])
    files[0].unlink()
    sha256_of_files(files[2:])
    memo = json.loads((own_cache / "hashes.json").read_text())
    assert [key.rsplit(":", 2)[0] for key in memo] == [str(files[1]), str(files[2])]
