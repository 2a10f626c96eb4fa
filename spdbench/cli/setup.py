"""The backends, devices, model and folder of a command: found and checked before it begins, and recorded in results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from spdbench.backend import Backend, BackendContext, BackendOptions, find_backend, parse_options
from spdbench.cli.options import (
    ModelOptions,
    TargetOptions,
    parse_backend_options,
    parse_drafters,
    require_concurrent,
)
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.judge.results.schema import BackendRecord, DrafterRecord, ModelInfo
from spdbench.models.target import Target, find_device, load_target
from spdbench.prompts.chat import ChatFormat, PlainText, parse_template_args
from spdbench.prompts.templates import BUILT_IN, find_template
from spdbench.types import Message

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True)
class BackendSpec:
    """A backend as chosen on the command line; not loaded."""

    label: str
    name: str
    cls: type[Backend]
    options: BackendOptions
    drafter: str

    def make(
        self,
        model: Target | None,
        devices: tuple[str, ...],
        threads: int,
        seed: int,
        chat: ChatFormat | PlainText | None = None,
    ) -> Backend:
        """The backend, before its `load`. `chat` is the run's format of conversations, if it has one."""
        args, name = (chat.template_args, chat.template_name) if chat else ({}, None)
        context = BackendContext(self.label, model, self.drafter, devices, threads, seed, args, name)
        return self.cls(self.options, context)

    def record(self, backend: Backend) -> BackendRecord:
        """What a result says of the loaded `backend`."""
        info = vars(backend.describe()).copy()
        del info["drafter"]
        return BackendRecord(
            name=self.name,
            label=self.label,
            kind=backend.kind,
            options=self.options.model_dump(mode="json"),
            num_devices=len(info["devices"]),
            lossy=not backend.lossless,
            lanes=len(info["lane_bytes"]),
            unknown=info.pop("missing_measurements"),
            **info,
        )


def find_backends(labels: Mapping[str, str], chosen: ModelOptions, concurrency: int | None = None) -> list[BackendSpec]:
    """The chosen backends, by label, with their options and drafters. Every backend with an option `concurrency` gets
    `concurrency`, unless its own -o gives another."""
    options = parse_backend_options(chosen.options, list(labels))
    drafters = parse_drafters(chosen.drafters, list(labels))
    classes = {label: find_backend(name) for label, name in labels.items()}
    if concurrency is not None:
        wide = require_concurrent(concurrency, classes)
        options |= {label: {"concurrency": str(concurrency), **options[label]} for label in wide}
    return [
        BackendSpec(label, name, cls, parse_options(label, cls.Options, options[label]), drafters[label])
        for (label, name), cls in zip(labels.items(), classes.values(), strict=True)
    ]


def find_levels(
    labels: Mapping[str, str], chosen: ModelOptions, levels: Sequence[int] | None
) -> list[list[BackendSpec]]:
    """The chosen backends for each number of requests at once, one list without any.

    Raises:
        InputError: as `find_backends`, or one of several levels would not be measured by a backend.
    """
    found = [find_backends(labels, chosen, level) for level in levels or (None,)]
    if levels is None or len(levels) == 1:
        return found
    for level, specs in zip(levels, found, strict=True):
        for spec in specs:
            at_once = getattr(spec.options, "concurrency", None)
            if at_once != level:
                words = (
                    "takes one request at a time" if at_once is None else f"has -o {spec.label}.concurrency={at_once}"
                )
                raise InputError(
                    f"--concurrency {','.join(map(str, levels))}: {spec.label} {words}; several numbers are for "
                    "servers, all of which are measured at each"
                )
    return found


def find_devices(chosen: TargetOptions) -> tuple[str, ...]:
    """The chosen devices, all checked; by default the first GPU, or the CPU where there is none. Sets the number of
    torch's threads."""
    torch.set_num_threads(chosen.threads)
    devices = chosen.devices or (("cuda:0",) if torch.cuda.is_available() else ("cpu",))
    for device in devices:
        find_device(device)
    return devices


def find_one_device(chosen: TargetOptions, use: str) -> str:
    """The chosen device, as `find_devices`, of a command that takes one.

    Raises:
        InputError: several are given; `use` says what one is for.
    """
    devices = find_devices(chosen)
    if len(devices) > 1:
        raise InputError(f"--devices {','.join(devices)}: one device {use}; give one")
    return devices[0]


def load_model(chosen: TargetOptions, device: str, default: str | None = None) -> Target:
    """The chosen model, else `default`, else `smollm2`; its weights are still on disk."""
    return load_target(chosen.model or default or DEFAULT_MODEL, chosen.dtype, device)


def chat_format(target: Target, chosen: TargetOptions) -> ChatFormat:
    """The model's format of conversations. Reports on stderr what in it may surprise: that there is none, or that it
    ends turns with a token at which answers do not end."""
    template = find_template(chosen.chat_template)
    chat = ChatFormat(target.tokenizer, parse_template_args(chosen.template_args), template)
    if not chat.is_chat:
        say(
            f"NOTE: {target.files.id} has no chat template: conversations are fed to it as plain text. If it was "
            f"trained on conversations, give its format by --chat-template (a file, {', '.join(BUILT_IN)})."
        )
    elif (end := chat.turn_end()) is not None and end not in target.eos_ids:
        # Not added to the others: some models (those that think aloud in channels) go on after such a token.
        say(
            f"NOTE: the chat template ends turns with {target.tokenizer.convert_ids_to_tokens(end)!r} (id {end}), at "
            f"which answers do not end: the model's eos ids are {sorted(target.eos_ids) or 'unknown'}. If it ends "
            "them, add it to eos_token_id in the model's generation_config.json."
        )
    return chat


def report_joined(chat: ChatFormat, conversations: Iterable[Sequence[Message]]) -> None:
    """Reports on stderr in how many conversations the template does not take the system message."""
    found = [bool(messages) and messages[0]["role"] == "system" for messages in conversations]
    if any(found) and not chat.takes_system:
        say(
            f"NOTE: the chat template takes no system message: in {sum(found):,} of {len(found):,} conversations its "
            "text opens the user's first message."
        )


def model_record(target: Target, chat: ChatFormat | PlainText) -> ModelInfo:
    """What a result says of the model."""
    return ModelInfo(
        id=target.files.id,
        sha256=target.files.sha256,
        dtype=target.dtype_name,
        num_layers=target.config.num_layers,
        num_parameters=target.num_parameters,
        bytes=target.num_bytes,
        template_sha256=chat.template_sha256,
        template_args=chat.template_args,
        chat_template=chat.template_name,
        tokenizer_sha256=target.files.tokenizer_sha256,
    )


def drafter_record(backend: Backend) -> DrafterRecord | None:
    """What a result says of where the drafts come from; None where there are none."""
    drafter = backend.describe().drafter
    return None if drafter is None else DrafterRecord(**asdict(drafter))
