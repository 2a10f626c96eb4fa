"""Chat templates that a user names: built-in ones for models that were published without, or a file.

Each built-in template writes the format of its model family's own training, so it works for models of that family only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spdbench.errors import InputError, did_you_mean
from spdbench.input_files import parse_json, read_input

MAX_TEMPLATE_BYTES = 2**22

_SYSTEM_FIRST = (
    "{%- set has_system = messages and messages[0].role == 'system' -%}"
    "{%- set turns = messages[1:] if has_system else messages -%}"
)
"""Sets `has_system`, and `turns` to the messages after the system prompt."""

_TURN_BY_TURN = (
    "{%- for message in turns -%}"
    "{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{- raise_exception('the roles of a conversation must take turns: user, assistant, user, ...') -}}"
    "{%- endif -%}"
)
"""Begins the loop over `turns`, whose roles alternate. The loop's end is the template's own."""

BUILT_IN = {
    # FastChat's `vicuna_v1.1`, of Vicuna 1.1, 1.3 and 1.5. The system prompt is the one that the models were trained
    # with, and is always there.
    "vicuna": (
        _SYSTEM_FIRST
        + "{{- bos_token -}}"
        + "{{- messages[0].content if has_system else "
        + '"A chat between a curious user and an artificial intelligence assistant. '
        + "The assistant gives helpful, detailed, and polite answers to the user's questions.\" -}}"
        + _TURN_BY_TURN
        + "{%- if message.role == 'user' -%}{{- ' USER: ' + message.content -}}"
        + "{%- else -%}{{- ' ASSISTANT: ' + message.content + eos_token -}}{%- endif -%}"
        + "{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
    ),
    # Llama 2 chat: a system prompt lies within the first user message.
    "llama-2": (
        _SYSTEM_FIRST
        + _TURN_BY_TURN
        + "{%- if message.role == 'user' -%}"
        + "{{- bos_token + '[INST] ' -}}"
        + "{%- if loop.first and has_system -%}"
        + "{{- '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -}}"
        + "{%- endif -%}"
        + "{{- message.content + ' [/INST]' -}}"
        + "{%- else -%}{{- ' ' + message.content + ' ' + eos_token -}}{%- endif -%}"
        + "{%- endfor -%}"
    ),
    # OpenAI's ChatML, which Qwen, Yi, SmolLM and many others use. It begins with no BOS token.
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}"
        "{{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
    ),
}


@dataclass(frozen=True)
class ChatTemplate:
    """A template in jinja that takes the place of the tokenizer's own. `name` has no folders: it goes into results."""

    name: str
    text: str


def find_template(word: str | None) -> ChatTemplate | None:
    """The template that `--chat-template` names: a built-in one, or a file, either the template itself or JSON with a
    `chat_template`, as in `tokenizer_config.json`. None without a name.

    Raises:
        InputError: no such template or file, or a file that holds none.
    """
    if word is None:
        return None
    if word in BUILT_IN:
        return ChatTemplate(word, BUILT_IN[word])
    path = Path(word)
    if not os.path.exists(path):
        raise InputError(
            f"--chat-template {word}: no such file, and none that is built in{did_you_mean(word, BUILT_IN)}"
        )
    try:
        text = read_input(path, MAX_TEMPLATE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"--chat-template {path}: not UTF-8") from None
    if path.suffix.lower() == ".json":
        try:
            found = parse_json(text)
        except ValueError as error:
            raise InputError(f"--chat-template {path}: {error}") from None
        if not isinstance(found, dict) or not isinstance(found.get("chat_template"), str):
            raise InputError(
                f"--chat-template {path}: JSON without a text `chat_template`; give a file of the template"
            )
        text = found["chat_template"]
    if not text.strip():
        raise InputError(f"--chat-template {path}: holds no template")
    return ChatTemplate(path.name, text)
