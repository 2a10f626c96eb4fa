"""From messages to token ids and back: the tokenizer's chat template, or plain completion if it has none.

Works with any tokenizer that has the interface of transformers, without importing transformers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from spdbench.errors import InputError, did_you_mean, given_by
from spdbench.prompts.render_limits import TooSlowError, memory_limit, time_limit
from spdbench.prompts.templates import BUILT_IN, ChatTemplate
from spdbench.types import Message, encodable

PROMPT_DATE = "01 Jan 2025"
"""The date for templates that write one, so that ids are the same on every day."""

OPEN_END = "\u2063open end\u2063"
"""Marks where an open turn is cut off; its invisible separators do not occur in ordinary text."""

RENDER_LIMIT_S = 10.0
"""The longest that a chat template may take for one conversation; a good one takes milliseconds."""
RENDER_LIMIT_BYTES = 2**29
MAX_RENDERED_CHARS = 2**23
"""Of a conversation; more than the longest contexts of models hold."""
PYTHON_WORDS = {"true": True, "false": False, "none": None, "null": None}
_FROZEN_CLOCK = f"{{%- macro strftime_now(format) -%}}{PROMPT_DATE}{{%- endmacro -%}}"


class ConversationRefusedError(InputError):
    """One conversation cannot be given to the model, as its chat template refuses it, for a role that it does not know
    for example, or crashes on it, or makes no tokens of it."""


def parse_template_args(words: Sequence[str]) -> dict[str, Any]:
    """`--template-arg KEY=VALUE` words; a value is JSON, such as a number or `false`, else text.

    Raises:
        InputError: a word of another form.
    """
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not (key.isascii() and key.isidentifier()):
            raise InputError(
                f"{given_by(word, '--template-arg')} {word}: expected KEY=VALUE, such as enable_thinking=false"
            )
        try:
            lower = text.lower()  # as people write it in Python, too: any text is true in a template
            found[key] = PYTHON_WORDS[lower] if lower in PYTHON_WORDS else _json_or_text(encodable(text))
        except ValueError as error:
            raise InputError(f"{given_by(word, '--template-arg')} {key}: {error}") from None
    return found


def _json_or_text(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


class PlainText:
    """Conversations with a model whose tokenizer is not available here, since a server tokenizes them.

    Ids are the UTF-8 bytes of the messages, so that equal conversations have equal ids.
    """

    template_sha256 = None
    template_name = None

    def __init__(self, template_args: Mapping[str, Any] | None = None) -> None:
        self.template_args = dict(template_args or {})

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
    joined by newlines, after the BOS token if this tokenizer adds one. `template_args` go to the template by name.
    `chosen` takes the place of the tokenizer's own template, and its name is `template_name`.

    Raises:
        InputError: the template has none of these arguments, or `chosen` fails on the shortest of conversations.
    """

    def __init__(
        self, tokenizer: Any, template_args: Mapping[str, Any] | None = None, chosen: ChatTemplate | None = None
    ) -> None:
        template = getattr(tokenizer, "chat_template", None) if chosen is None else chosen.text
        if isinstance(template, Mapping):  # several named ones, as some tool-using models have
            template = template.get("default")
        self._tokenizer = tokenizer
        self.template_name = None if chosen is None else chosen.name
        self._template: str | None = template or None
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest() if template else None
        self.template_args = dict(template_args or {})
        for key in self.template_args:
            self._require_argument(key)
        if chosen is not None:
            try:
                self.encode([{"role": "user", "content": "a"}])
            except InputError as error:
                reason = str(error).replace("the model's chat template", "it")
                raise InputError(f"--chat-template {chosen.name}: {reason}") from None

    @property
    def is_chat(self) -> bool:
        return self._template is not None

    @cached_property
    def takes_system(self) -> bool:
        """False if the chat template refuses or drops a system message: its text then opens the user's first one."""
        if self._template is None:
            return True
        messages = [{"role": "system", "content": OPEN_END}, {"role": "user", "content": "a"}]
        try:
            return OPEN_END in self._render(messages, self._template, add_generation_prompt=True)
        except InputError:
            return False

    def turn_end(self) -> int | None:
        """The special token with which the chat template ends an answer that another message follows; None where it
        uses none, or cannot be asked."""
        question: Message = {"role": "user", "content": "a"}
        answer: Message = {"role": "assistant", "content": OPEN_END}
        try:
            shown = self._render([question, answer, question], self._template or "")
        except InputError:
            return None
        _, mark, rest = shown.rpartition(OPEN_END)
        ids = self.encode_answer(rest.lstrip()) if mark else ()
        return ids[0] if ids and self._is_special(ids[0]) else None

    def _is_special(self, token_id: int) -> bool:
        """True for a control token, whether a setting names it (`eos_token`) or only the list of added tokens does."""
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        return token_id in self._tokenizer.all_special_ids or bool(added and added.special)

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the conversation, after which the model's answer to the last message follows.

        Raises:
            InputError: the chat template refuses these messages or crashes on them, or the conversation has no tokens.
        """
        ids: Sequence[int]
        if self._template is None:
            ids = self.encode_text("\n".join(message["content"] for message in messages))
        else:
            messages = self._as_taken(messages)
            ids = self.encode_answer(self._render(messages, self._template, add_generation_prompt=True))
        if not ids:
            source = "tokenizer" if self._template is None else "chat template"
            raise ConversationRefusedError(
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
        shown = self._render(self._as_taken([*messages, turn]), self._template)
        text, mark, _ = shown.rpartition(OPEN_END)
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
        return self._render(self._as_taken(messages), self._template, **ending)

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer's text as the model would generate them, without special tokens around it."""
        return tuple(int(token) for token in self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens, with its spaces unchanged."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _require_argument(self, key: str) -> None:
        """Raises `InputError` for an argument that the template does not read, or that is not the user's to give."""
        if self._template is None:
            raise InputError(
                f"--template-arg {key}: the model has no chat template; leave the option out, or give one by "
                f"--chat-template (a file, {', '.join(BUILT_IN)})"
            )
        own = getattr(self._tokenizer, "template_arguments", None)
        own = inspect.signature(self._tokenizer.apply_chat_template).parameters if own is None else own
        if key == "messages" or key in own:
            raise InputError(f"--template-arg {key}: is set by spdbench; leave it out")
        words = set(re.findall(r"[A-Za-z_]\w*", self._template))
        if key not in words:
            hint = did_you_mean(key, words).partition(" Known:")[0]
            raise InputError(f"--template-arg {key}: the model's chat template does not read this argument{hint}")

    def _as_taken(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages`, without a system message where the template takes none."""
        if not messages or messages[0]["role"] != "system" or self.takes_system:
            return messages
        system, *rest = messages
        if not rest or rest[0]["role"] != "user":
            return [{"role": "user", "content": system["content"]}, *rest]
        return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]

    def _render(self, messages: Sequence[Message], template: str, **options: Any) -> str:
        """The conversation as text, of which nothing is cut."""
        from jinja2 import TemplateError

        # Templates read the date from `date_string` or from `strftime_now`, which only a macro can shadow.
        clock = _FROZEN_CLOCK if "strftime_now" in template else ""
        try:
            with memory_limit(RENDER_LIMIT_BYTES), time_limit(RENDER_LIMIT_S):
                shown = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=clock + template,
                    tokenize=False,
                    **{"date_string": PROMPT_DATE, **self.template_args, **options},
                )
        except TemplateError as error:
            raise ConversationRefusedError(f"the model's chat template refuses this conversation: {error}") from None
        except TooSlowError:
            raise InputError(
                f"the model's chat template does not end within {RENDER_LIMIT_S:g} seconds; use another model, or mend "
                "its template"
            ) from None
        except Exception as error:  # a template is code from the model's author and may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ConversationRefusedError(
                f"the model's chat template crashes on this conversation ({reason})"
            ) from None
        if len(shown) > MAX_RENDERED_CHARS:  # a library that is not written in Python would take all memory for it
            raise ConversationRefusedError(
                f"the model's chat template makes {len(shown):,} characters of this conversation, more than any model "
                "reads"
            )
        return str(shown)
