"""From messages to token ids and back: the tokenizer's chat template, or plain completion where there is none.

Works with any tokenizer that has the interface of transformers; this module imports nothing of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spdbench.errors import InputError
from spdbench.types import Message

PROMPT_DATE = "01 Jan 2025"
"""The day that templates with a date in them get to see, so that ids are the same on every day."""

OPEN_END = "\u2063open end\u2063"
"""Stands where a turn that is left open is cut off, in no text that anybody writes."""

_FROZEN_CLOCK = f"{{%- macro strftime_now(format) -%}}{PROMPT_DATE}{{%- endmacro -%}}"


class PlainText:
    """Conversations with a model whose tokenizer nobody here has: its server makes tokens of them.

    Ids are the UTF-8 bytes of what is said, so that equal conversations are known as such.
    """

    template_sha256 = None

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(json.dumps([dict(message) for message in messages], ensure_ascii=False).encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Raises `ValueError`: a server tells its answers as text."""
        if ids:
            raise ValueError("the ids of a served model mean nothing here")
        return ""


class ChatFormat:
    """The format in which one tokenizer's model expects a conversation.

    `template_sha256` identifies the chat template as published; None means plain completion: the messages' texts
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
        """Ids to feed the model so that its answer to the last message comes next.

        Raises:
            InputError: the chat template refuses these messages or crashes on them, or there is nothing to feed.
        """
        if self._template is None:
            ids = self.encode_text("\n".join(message["content"] for message in messages))
        else:
            ids = self._encode_chat(messages, self._template)
        if not ids:
            who = "tokenizer" if self._template is None else "chat template"
            raise InputError(f"the model's {who} makes no tokens of this conversation, so there is nothing to feed it")
        return ids

    def encode_open(self, messages: Sequence[Message], begun: str) -> tuple[int, ...]:
        """Ids to feed the model so that the user's next turn, which begins with `begun`, goes on.

        Raises:
            InputError: as `encode`, or the chat template changes what the user says beyond recognition.
        """
        if self._template is None:
            return self.encode([*messages, {"role": "user", "content": begun}])
        turn = {"role": "user", "content": begun + OPEN_END}
        text, mark, _ = self._render([*messages, turn], self._template, tokenize=False).rpartition(OPEN_END)
        if not mark:
            raise InputError("the model's chat template does not show what the user says, so no turn can be left open")
        return tuple(int(token) for token in self._tokenizer.encode(text, add_special_tokens=False))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a text as it is, after a BOS token if this tokenizer adds one and the text has none."""
        # Not `add_special_tokens` alone: some tokenizers then add an EOS too, after which there is nothing to say.
        bos = self._tokenizer.bos_token_id
        plain = tuple(int(token) for token in self._tokenizer.encode(text, add_special_tokens=False))
        adds_bos = bos is not None and list(self._tokenizer.encode(text))[:1] == [bos]
        return (bos, *plain) if adds_bos and plain[:1] != (bos,) else plain

    def text(self, messages: Sequence[Message], *, answered: bool) -> str:
        """The conversation with the chat template around it, open for an answer, or for the rest of the last message
        if that is an answer (`answered`).

        Raises:
            InputError: there is no chat template, or as `encode`.
        """
        if self._template is None:
            raise InputError("the model has no chat template to apply; leave the option out")
        how = {"continue_final_message": True} if answered else {"add_generation_prompt": True}
        return str(self._render(messages, self._template, tokenize=False, **how))

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer's text alone, as the model would put them out: without any special token around it."""
        return tuple(int(token) for token in self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens, spaces as they are."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _encode_chat(self, messages: Sequence[Message], template: str) -> tuple[int, ...]:
        ids = self._render(messages, template, tokenize=True, add_generation_prompt=True, return_dict=False)
        return tuple(int(token) for token in ids)

    def _render(self, messages: Sequence[Message], template: str, **how: Any) -> Any:
        from jinja2 import TemplateError

        # A template gets the date from `date_string` or from a clock of its own, which only a macro can shadow.
        clock = _FROZEN_CLOCK if "strftime_now" in template else ""
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=clock + template,
                date_string=PROMPT_DATE,
                **how,
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from None
        except Exception as error:  # a template is the model's own code and may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"the model's chat template crashes on this conversation ({reason})") from None
