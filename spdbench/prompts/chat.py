"""From messages to token ids and back: the tokenizer's chat template, or plain completion if it has none.

Works with any tokenizer that has the interface of transformers, without importing transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spdbench.errors import InputError
from spdbench.types import Message

PROMPT_DATE = "01 Jan 2025"
"""The date for templates that write one, so that ids are the same on every day."""

OPEN_END = "\u2063open end\u2063"
"""Marks where an open turn is cut off; its invisible separators do not occur in ordinary text."""

_FROZEN_CLOCK = f"{{%- macro strftime_now(format) -%}}{PROMPT_DATE}{{%- endmacro -%}}"


class PlainText:
    """Conversations with a model whose tokenizer is not available here, since a server tokenizes them.

    Ids are the UTF-8 bytes of the messages, so that equal conversations have equal ids.
    """

    template_sha256 = None

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(json.dumps([dict(message) for message in messages], ensure_ascii=False).encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Always empty. Raises `ValueError` for ids: a server sends its answers as text."""
        if ids:
            raise ValueError("the ids of a served model mean nothing here")
        return ""


class ChatFormat:
    """The format in which a tokenizer's model expects a conversation.

    `template_sha256` identifies the chat template as published. None means plain completion: the messages' texts
    joined by newlines, after the BOS token if this tokenizer adds one.
    """

    def __init__(self, tokenizer: Any) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, Mapping):  # several named ones, as some tool-using models have
            template = template.get("default")
        self._tokenizer = tokenizer
        self._template: str | None = template or None
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest() if template else None

    @property
    def is_chat(self) -> bool:
        return self._template is not None

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the conversation, after which the model's answer to the last message follows.

        Raises:
            InputError: the chat template refuses these messages or crashes on them, or the conversation has no tokens.
        """
        ids: Sequence[int]
        if self._template is None:
            ids = self.encode_text("\n".join(message["content"] for message in messages))
        else:
            ids = self._render(messages, self._template, tokenize=True, add_generation_prompt=True, return_dict=False)
        if not ids:
            source = "tokenizer" if self._template is None else "chat template"
            raise InputError(
                f"the model's {source} makes no tokens of this conversation, so there is nothing to feed it"
            )
        return tuple(map(int, ids))

    def encode_open(self, messages: Sequence[Message], begun: str) -> tuple[int, ...]:
        """Ids of the conversation and of a user's turn that begins with `begun`, for the model to continue the turn.

        Raises:
            InputError: as `encode`, or the chat template's output does not contain the user's text.
        """
        if self._template is None:
            return self.encode([*messages, {"role": "user", "content": begun}])
        turn = {"role": "user", "content": begun + OPEN_END}
        text, mark, _ = self._render([*messages, turn], self._template, tokenize=False).rpartition(OPEN_END)
        if not mark:
            raise InputError("the model's chat template does not show what the user says, so no turn can be left open")
        return self.encode_answer(text)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of `text`, after a BOS token if this tokenizer adds one and the text has none."""
        # `add_special_tokens=True` would not do: some tokenizers then add an EOS too, after which a model ends at once.
        bos = self._tokenizer.bos_token_id
        plain = self.encode_answer(text)
        adds_bos = bos is not None and list(self._tokenizer.encode(text))[:1] == [bos]
        return (bos, *plain) if adds_bos and plain[:1] != (bos,) else plain

    def text(self, messages: Sequence[Message], *, answered: bool) -> str:
        """The conversation as text in the chat template, open for an answer, or if the last message is one
        (`answered`), for the rest of it.

        Raises:
            InputError: there is no chat template, or as `encode`.
        """
        if self._template is None:
            raise InputError("the model has no chat template to apply; leave the option out")
        ending = {"continue_final_message": True} if answered else {"add_generation_prompt": True}
        return str(self._render(messages, self._template, tokenize=False, **ending))

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer's text as the model would generate them, without special tokens around it."""
        return tuple(int(token) for token in self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens, with its spaces unchanged."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _render(self, messages: Sequence[Message], template: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        # Templates read the date from `date_string` or from `strftime_now`, which only a macro can shadow.
        clock = _FROZEN_CLOCK if "strftime_now" in template else ""
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=clock + template,
                date_string=PROMPT_DATE,
                **options,
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from None
        except Exception as error:  # a template is code from the model's author and may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"the model's chat template crashes on this conversation ({reason})") from None
