"""Messages to ids and back, with tiny tokenizers made here."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spdbench.errors import InputError
from spdbench.prompts import chat as chats
from spdbench.prompts.chat import (
    PROMPT_DATE,
    ChatFormat,
    ConversationRefusedError,
    PlainText,
    parse_template_args,
)
from spdbench.prompts.templates import BUILT_IN, ChatTemplate, find_template

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<user>", "<assistant>"]
HELLO = [{"role": "user", "content": "hi"}]
TALK = [*HELLO, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "bye"}]


def tokenizer(template: Any = None, adds: str = "") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, one id a byte; `adds` is what it puts around a text: `bos`, `bos eos` or nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if adds:
        single = "<s> $A </s>" if "eos" in adds else "<s> $A"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    made.chat_template = template
    return made


def shown(chat: ChatFormat, inner: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    return str(inner.decode(list(chat.encode(messages)), skip_special_tokens=False))


def test_chat_template_wraps_messages_and_opens_the_answer() -> None:
    inner = tokenizer(TEMPLATE)
    chat = ChatFormat(inner)
    assert chat.is_chat
    assert shown(chat, inner, TALK) == "<user>hi</s><assistant>yes?</s><user>bye</s><assistant>"


def test_ids_are_plain_ints_in_a_tuple() -> None:
    ids = ChatFormat(tokenizer(TEMPLATE)).encode(HELLO)
    assert isinstance(ids, tuple)
    assert all(type(token) is int for token in ids)


def test_chat_template_gets_no_second_bos() -> None:
    inner = tokenizer("<s>" + TEMPLATE, adds="bos")
    assert ChatFormat(inner).encode(HELLO).count(0) == 1


def test_template_hash_is_of_the_published_text() -> None:
    assert ChatFormat(tokenizer(TEMPLATE)).template_sha256 == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_of_several_templates_the_default_is_used() -> None:
    inner = tokenizer({"default": TEMPLATE, "tool_use": "x"})
    assert ChatFormat(inner).template_sha256 == ChatFormat(tokenizer(TEMPLATE)).template_sha256
    assert shown(ChatFormat(inner), inner, HELLO) == "<user>hi</s><assistant>"
    assert not ChatFormat(tokenizer({"tool_use": "x"})).is_chat


@pytest.mark.parametrize(
    "clock",
    [
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}",
        "{{ strftime_now('%Y-%m-%d') }}",
        "{% set today = strftime_now('%H:%M:%S') %}{{ today }}",
        "{% macro head() %}{{ strftime_now('%c') }}{% endmacro %}{{ head() }}",
    ],
)
def test_template_with_a_date_gives_the_same_ids_on_every_day(clock: str) -> None:
    inner = tokenizer(clock + TEMPLATE)
    assert shown(ChatFormat(inner), inner, HELLO) == f"{PROMPT_DATE}<user>hi</s><assistant>"


def test_template_that_refuses_a_conversation_is_quoted() -> None:
    chat = ChatFormat(tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InputError, match="chat template refuses this conversation: roles must alternate"):
        chat.encode(HELLO)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ 'a' + 1 }}", "TypeError: "),
        ("{{ messages[0].content.encode('utf-16', 'nosuch').decode('ascii') }}", "UnicodeDecodeError: "),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError: "),
    ],
)
def test_crash_of_a_template_is_reported_as_the_models(template: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatFormat(tokenizer(template)).encode(HELLO)
    assert str(caught.value).startswith(f"the model's chat template crashes on this conversation ({reason}")


@pytest.mark.parametrize(("template", "who"), [("{# nothing #}", "chat template"), (None, "tokenizer")])
def test_conversation_of_no_tokens_is_refused(template: str | None, who: str) -> None:
    messages = HELLO if template else [{"role": "user", "content": ""}]
    with pytest.raises(InputError, match=f"the model's {who} makes no tokens of this conversation"):
        ChatFormat(tokenizer(template)).encode(messages)


@pytest.mark.parametrize(("adds", "expected"), [("", "hi\nyes?\nbye"), ("bos", "<s>hi\nyes?\nbye")])
def test_without_template_turns_are_joined_and_bos_is_the_tokenizers_choice(adds: str, expected: str) -> None:
    inner = tokenizer(adds=adds)
    chat = ChatFormat(inner)
    assert not chat.is_chat
    assert chat.template_sha256 is None
    assert shown(chat, inner, TALK) == expected


def test_plain_completion_has_no_eos_after_which_there_is_nothing_to_say() -> None:
    inner = tokenizer(adds="bos eos")
    assert shown(ChatFormat(inner), inner, HELLO) == "<s>hi"


def test_plain_text_that_begins_with_bos_gets_no_second_one() -> None:
    inner = tokenizer(adds="bos")
    assert ChatFormat(inner).encode([{"role": "user", "content": "<s>hi"}]).count(0) == 1


def test_decode_leaves_out_special_tokens_and_keeps_spaces() -> None:
    inner = tokenizer(TEMPLATE)
    text = "It 's  here , \n\u00e9\u4e2d"
    ids = [0, *inner.encode(text, add_special_tokens=False), 1]
    assert ChatFormat(inner).decode(tuple(ids)) == text


def test_turn_left_open_goes_on_after_what_was_begun() -> None:
    inner = tokenizer(TEMPLATE)
    ids = ChatFormat(inner).encode_open(TALK[:2], "How do")
    assert inner.decode(list(ids), skip_special_tokens=False) == "<user>hi</s><assistant>yes?</s><user>How do"


def test_turn_left_open_without_a_template_follows_on_a_new_line() -> None:
    inner = tokenizer()
    assert inner.decode(list(ChatFormat(inner).encode_open(HELLO, "How"))) == "hi\nHow"


def test_template_that_hides_what_the_user_says_cannot_leave_a_turn_open() -> None:
    with pytest.raises(InputError, match="no turn can be left open"):
        ChatFormat(tokenizer("{{ messages | length }}")).encode_open(HELLO, "How")


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
DROPS_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + TEMPLATE


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_system_message_that_the_template_does_not_take_opens_the_users_first(template: str) -> None:
    inner = tokenizer(template)
    chat, system = ChatFormat(inner), {"role": "system", "content": "Be kind."}
    assert not chat.takes_system
    assert shown(chat, inner, [system, *HELLO]) == "<user>Be kind.\n\nhi</s><assistant>"
    assert shown(chat, inner, [system, TALK[1]]) == "<user>Be kind.</s><assistant>yes?</s><assistant>"
    assert inner.decode(list(chat.encode_open([system], "Well"))) == "<user>Be kind.\n\nWell"
    assert shown(chat, inner, TALK) == shown(ChatFormat(tokenizer(TEMPLATE)), inner, TALK)


def test_a_system_message_that_the_template_takes_stays() -> None:
    inner = tokenizer(TEMPLATE)
    assert ChatFormat(inner).takes_system
    assert ChatFormat(tokenizer()).takes_system
    assert "Be kind.</s><user>" in shown(ChatFormat(inner), inner, [{"role": "system", "content": "Be kind."}, *HELLO])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, 1),
        (TEMPLATE.replace("</s>", "\n</s>"), 1),
        (TEMPLATE.replace("</s>", "\n"), 2),  # the next turn's own token is all that ends this one
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("</s>{{ messages[-1].content }}", None),  # earlier answers are not shown
        (None, None),
    ],
)
def test_the_token_that_ends_turns_is_read_off_the_template(template: str | None, expected: int | None) -> None:
    assert ChatFormat(tokenizer(template)).turn_end() == expected


def test_a_turn_may_end_with_a_control_token_that_no_setting_names() -> None:
    inner = tokenizer(TEMPLATE.replace("</s>", "<end>"))
    inner.backend_tokenizer.add_special_tokens(["<end>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner.backend_tokenizer, eos_token="</s>")
    made.chat_template = inner.chat_template
    assert made.convert_tokens_to_ids("<end>") not in made.all_special_ids
    assert ChatFormat(made).turn_end() == made.convert_tokens_to_ids("<end>")


THINKS = TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>{{ depth }}{% endif %}"


def test_template_arguments_reach_the_template() -> None:
    inner = tokenizer(THINKS)
    plain, silent = ChatFormat(inner), ChatFormat(inner, parse_template_args(["enable_thinking=False"]))
    assert shown(plain, inner, HELLO).endswith("<think>")
    assert not shown(silent, inner, HELLO).endswith("<think>")
    assert silent.template_sha256 == plain.template_sha256
    assert shown(ChatFormat(inner, {"depth": 3}), inner, HELLO).endswith("<think>3")


def test_template_arguments_are_json_else_text() -> None:
    words = ["a=false", "b=True", "c=2.5", "d=[1]", "e=low", "f=None", "g=NaN", "h=x=y", 'i="1"', "j=" + "[" * 9999]
    found = parse_template_args(words)
    expected = {"a": False, "b": True, "c": 2.5, "d": [1], "e": "low", "f": None, "g": "NaN", "h": "x=y", "i": "1"}
    assert found == expected | {"j": "[" * 9999}
    assert PlainText(found).template_args == found


@pytest.mark.parametrize("word", ["enable_thinking", "=1", "a b=1", "\u00e4=1", "a=\udc80"])
def test_template_arguments_of_another_form_are_refused(word: str) -> None:
    with pytest.raises(InputError, match="--template-arg "):
        parse_template_args([word])


@pytest.mark.parametrize(
    ("template", "key", "why"),
    [
        (THINKS, "enable_thinkin", "chat template does not read this argument; did you mean 'enable_thinking'?"),
        (THINKS, "messages", "is set by spdbench"),
        (THINKS, "add_generation_prompt", "is set by spdbench"),
        (None, "enable_thinking", "the model has no chat template"),
    ],
)
def test_template_arguments_that_nothing_reads_are_refused(template: str | None, key: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatFormat(tokenizer(template), {key: 1})
    assert f"--template-arg {key}: " in str(caught.value)
    assert why in str(caught.value)


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "RENDER_LIMIT_S", 0.2)
    rounds = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"does not end within 0\.2 seconds"):
        ChatFormat(tokenizer(rounds + TEMPLATE)).encode(HELLO)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit it")
@pytest.mark.parametrize(
    "words",
    [
        "{% set x = 'a' * 10**9 %}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'a'.center(10**9) }}",
        "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ (range(99999) | list | string) * 9999 }}",
    ],
)
def test_a_template_that_takes_gigabytes_is_stopped(words: str) -> None:
    with pytest.raises(InputError, match=r"crashes on this conversation \(MemoryError"):
        ChatFormat(tokenizer(words + TEMPLATE)).encode(HELLO)
    assert len(bytearray(chats.RENDER_LIMIT_BYTES + 2**20)) > 2**20  # the limit is over


def test_a_text_that_no_model_reads_is_not_tokenized() -> None:
    with pytest.raises(InputError, match=r"makes 9,000,\d\d\d characters of this conversation"):
        ChatFormat(tokenizer("{{ 'a' * 9000000 }}" + TEMPLATE)).encode(HELLO)


def chosen(name: str, messages: list[dict[str, str]], **special: Any) -> str:
    inner = tokenizer(None, **special)
    return shown(ChatFormat(inner, None, find_template(name)), inner, messages)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("name", "expected", "with_system"),
    [
        (
            "llama-2",
            "<s>[INST] hi [/INST] yes? </s><s>[INST] bye [/INST]",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST]",
        ),
        (
            "chatml",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes?<|im_end|>\n"
            "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "zephyr",
            "<|user|>\nhi</s>\n<|assistant|>\nyes?</s>\n<|user|>\nbye</s>\n<|assistant|>\n",
            "<|system|>\nBe brief.</s>\n<|user|>\nhi</s>\n<|assistant|>\n",
        ),
    ],
)
def test_built_in_templates_write_their_familys_format(name: str, expected: str, with_system: str) -> None:
    assert chosen(name, TALK) == expected
    assert chosen(name, [SYSTEM, *HELLO]) == with_system


def test_vicuna_has_its_own_system_prompt_unless_another_is_given() -> None:
    assert chosen("vicuna", TALK).startswith("<s>A chat between a curious user")
    assert chosen("vicuna", TALK).endswith("user's questions. USER: hi ASSISTANT: yes?</s> USER: bye ASSISTANT:")
    assert chosen("vicuna", [SYSTEM, *HELLO]) == "<s>Be brief. USER: hi ASSISTANT:"


@pytest.mark.parametrize("name", ["vicuna", "llama-2"])
def test_templates_whose_turns_alternate_refuse_others(name: str) -> None:
    with pytest.raises(ConversationRefusedError, match="must take turns"):
        chosen(name, [*HELLO, *HELLO])


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_a_model_without_a_template_is_no_plain_text_with_a_chosen_one(name: str) -> None:
    chat = ChatFormat(tokenizer(None), None, find_template(name))
    assert chat.is_chat
    assert chat.takes_system
    assert chat.template_name == name
    assert chat.template_sha256 == hashlib.sha256(BUILT_IN[name].encode()).hexdigest()


def test_a_chosen_template_beats_the_tokenizers_own_and_takes_arguments(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ prefix }}{{ messages[0].content }}", encoding="utf-8")
    inner = tokenizer(TEMPLATE)
    chat = ChatFormat(inner, {"prefix": "> "}, find_template(str(path)))
    assert shown(chat, inner, HELLO) == "> hi"
    assert chat.template_name == "mine.jinja"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}!"}')
    found = find_template(str(tmp_path / "tokenizer_config.json"))
    assert shown(ChatFormat(inner, None, found), inner, HELLO) == "hi!"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jinja", None, "no such file, and none that is built in"),
        ("t.jinja", b"\xff", "not UTF-8"),
        ("t.jinja", b" \n", "holds no template"),
        ("t.json", b"[1]", "JSON without a text `chat_template`"),
        ("t.json", b"{", "not JSON"),
    ],
)
def test_a_template_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"--chat-template .*{re.escape(expected)}"):
        find_template(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% for %}", "--chat-template t: it refuses this conversation"),
        ("{{ 1 / 0 }}", "--chat-template t: it crashes on this conversation"),
        ("{% if false %}a{% endif %}", "makes no tokens"),
    ],
)
def test_a_template_that_cannot_be_used(text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        ChatFormat(tokenizer(TEMPLATE), None, ChatTemplate("t", text))


def test_a_misspelt_built_in_template_is_recognised() -> None:
    with pytest.raises(InputError, match="did you mean 'vicuna'"):
        find_template("vicunna")
