"""A model's tokenizer and chat template without transformers: by `tokenizers` and jinja2, to the same ids and texts.

How transformers assembles a tokenizer from a model's files differs from class to class. `TokenizerFacts` is what comes
out of it: the tokenizer of the library `tokenizers`, and which tokens are special. `library.tokenizer_facts` reads
these facts once, and tests hold what is made of them here to transformers' own ids, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from typing import Any

CONTINUED = "\u2063continued here\u2063 "
"""Marks the end of a message that is to be continued. The space shows whether the template strips what it is given."""


@dataclass(frozen=True)
class TokenizerFacts:
    """`backend` is the tokenizer in the JSON of `tokenizers`; `special_tokens` are those that have a name, which chat
    templates read; `template_arguments` are the names of transformers' own arguments to a template.
    `splits_special_tokens`: special tokens in a text are read as plain text."""

    backend: str
    special_tokens: dict[str, str]
    all_special_ids: tuple[int, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | dict[str, str] | None
    template_arguments: frozenset[str]
    splits_special_tokens: bool


class FastTokenizer:
    """The part of transformers' tokenizers that `prompts.chat` needs, under the same names."""

    def __init__(self, facts: TokenizerFacts) -> None:
        from tokenizers import Tokenizer

        self._facts = facts
        self._backend = Tokenizer.from_str(facts.backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = facts.splits_special_tokens
        self.all_special_ids = facts.all_special_ids
        self.bos_token_id, self.eos_token_id = facts.bos_token_id, facts.eos_token_id
        self.chat_template = facts.chat_template
        self.template_arguments = facts.template_arguments

    @cached_property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The added tokens by id; each has `content` and `special`."""
        return dict(self._backend.get_added_tokens_decoder())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,  # noqa: ARG002 - spaces are never changed here
    ) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        chat_template: str,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,  # noqa: ARG002 - ids are always a list
        **variables: Any,
    ) -> Any:
        """The conversation as ids, or as text unless `tokenize`; `variables` are the template's own.

        Raises:
            jinja2.TemplateError: the template refuses the conversation, or is none.
            ValueError: there are no messages, or the last one cannot be continued.
        """
        messages = [dict(message) for message in conversation]
        if not messages:
            raise ValueError("a chat template needs at least one message")
        last = messages[-1]["content"]
        if continue_final_message:
            if "content" not in chat_template:
                raise ValueError("the chat template reads no content, so no message can be continued")
            messages[-1]["content"] = last + CONTINUED
        text = _compiled(chat_template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._facts.special_tokens, **variables},
        )
        if continue_final_message:
            text = _up_to_mark(text, last)
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _up_to_mark(text: str, last: str) -> str:
    """`text` up to where the message `last` is to be continued."""
    before, mark, rest = text.rpartition(CONTINUED.strip())
    if not mark or last.strip() not in before:
        raise ValueError("the chat template does not show the last message, so it cannot be continued")
    return before if rest.startswith(" ") else before.rstrip()


@cache
def _compiled(template: str) -> Any:
    """The template, in an environment like that of transformers: a sandbox, as the template comes from outside."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the model's own words for training; here its content is only shown."""

        tags = {"generation"}  # noqa: RUF012 - as in its base class

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

        def _show(self, caller: Any) -> Any:
            return caller()

    class PublicNamespace(Namespace):
        """A namespace without names that begin with an underscore, by which the sandbox could be left."""

        def __init__(*args: Any, **values: Any) -> None:
            names = dict(*args[1:], **values)
            for name in names:
                require_public(name)
            Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            require_public(name)
            super().__setitem__(name, value)

    def require_public(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a chat template may not use the name {name!r} in a namespace")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def as_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_PublicDict(),
        namespace=PublicNamespace,
    )
    return environment.from_string(template)


class _PublicDict:
    """`dict` as templates may use it, without its other attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)
