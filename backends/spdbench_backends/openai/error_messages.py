"""What to tell a user whose server cannot be used: what it said, and what to do. Knows no connections."""

from __future__ import annotations

from spdbench.errors import InputError
from spdbench_backends.openai.client import Address, RefusedError, UnreachableError

TOO_LONG = ("context", "max_model_len", "too long", "maximum length", "exceed")


def describe_unreachable(label: str, address: Address, why: UnreachableError) -> InputError:
    return InputError(
        f"-o {label}.base_url: no server answers at {address.host}:{address.port} ({why}); start it, or correct the "
        "address"
    )


def describe_refusal(label: str, model: str, refusal: RefusedError) -> InputError:
    """What a refusal means that will not be otherwise the next time."""
    status, said = refusal.status, f" It says: {refusal.words}" if refusal.words else ""
    if status in (401, 403):
        return InputError(
            f"-b {label}: the server refuses the key ({status}); put the right one into the environment variable "
            f"OPENAI_API_KEY.{said}"
        )
    if status == 404:
        return InputError(
            f"-o {label}.model={model}: the server has no such model, or nothing at this address (404); its list is at "
            f"/models below -o {label}.base_url, which ends in /v1 with most servers.{said}"
        )
    if 300 <= status < 400:
        return InputError(f"-o {label}.base_url: the server sends one elsewhere ({status}); give the address it means")
    if any(word in refusal.words.lower() for word in TOO_LONG):
        return InputError(
            f"-b {label}: the server's context is too small ({status}); start it with a larger one, or lower "
            f"--max-new-tokens.{said}"
        )
    return InputError(f"-b {label}: the server refuses the request ({status}); change what it names.{said}")
