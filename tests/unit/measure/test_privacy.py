"""What is kept out of files: folders and secrets, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdbench.measure.assemble import ResultHead, write_result
from spdbench.measure.journal import create_journal
from spdbench.measure.privacy import names_only, without_secrets
from tests.builders import TRAINED, make_backend, make_result, make_run


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/planted")
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    monkeypatch.setenv("MY_API_KEY", "short")
    monkeypatch.setenv("COLOUR", "ultramarine")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/planted/heads/mine", "mine"),
        ("~/heads/mine.pt", "mine.pt"),
        ("./heads/mine", "mine"),
        ("../mine", "mine"),
        ("/", "/"),
        ("openai/gsm8k", "openai/gsm8k"),
        ("oracle:0.8", "oracle:0.8"),
        ("path gsm8k/question.jsonl", "path gsm8k/question.jsonl"),
        ("1,2,3", "1,2,3"),
        ("key=hf_planted_token", "key=***"),
        ("tree=/home/planted/x", "tree=~/x"),
    ],
)
def test_of_a_path_only_the_name_is_kept(text: str, kept: str) -> None:
    assert names_only(text) == kept


def test_a_relative_path_that_is_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names_only("private/model") == "model"


def test_paths_are_found_anywhere_in_plain_data() -> None:
    value = {"model": "/srv/x/m", "sizes": [1, 2.5], "deep": [{"tree": "~/t.json"}], "none": None, "yes": True}
    assert names_only(value) == {
        "model": "m",
        "sizes": [1, 2.5],
        "deep": [{"tree": "t.json"}],
        "none": None,
        "yes": True,
    }


def test_messages_keep_their_words_but_neither_home_nor_secret() -> None:
    message = "FileNotFoundError: '/home/planted/a b' for hf_planted_token, short, ultramarine"
    assert without_secrets(message) == "FileNotFoundError: '~/a b' for ***, short, ultramarine"


@pytest.mark.parametrize("name", ["OPENAI_KEY", "GH_PAT", "MYSQL_PWD", "DB_PASS", "DB_PASSWORD", "key"])
def test_names_that_secrets_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "planted-secret")
    assert without_secrets("with planted-secret") == "with ***"


@pytest.mark.parametrize("name", ["PWD", "KEYBOARD", "PATTERN", "BYPASS"])
def test_names_that_secrets_do_not_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "no-secret-at-all")
    assert without_secrets("with no-secret-at-all") == "with no-secret-at-all"


def test_a_login_in_a_url_is_cut_out() -> None:
    assert (
        without_secrets("postgres://me:planted@db:5432/x, http://a:80/@b") == "postgres://***@db:5432/x, http://a:80/@b"
    )
    assert without_secrets("cloning https://ghp_planted@host/x") == "cloning https://***@host/x"
    assert without_secrets("http://h/v1?a=1&api_key=planted&token=x y") == "http://h/v1?a=1&api_key=***&token=*** y"


def test_home_is_found_by_its_real_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert without_secrets(f"{tmp_path}/real/a {tmp_path}/link/b") == "~/a ~/b"


def test_a_secret_is_found_as_json_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", 'a"planted"one')
    assert without_secrets(r'{"key": "a\"planted\"one"}') == '{"key": "***"}'


def test_a_folder_that_only_begins_like_home_is_not_home() -> None:
    assert without_secrets("/home/planted2/a /home/planted") == "/home/planted2/a ~"


def test_without_a_home_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert without_secrets("a/b /c") == "a/b /c"


def test_a_result_holds_no_folder_of_any_backend_or_drafter(tmp_path: Path) -> None:
    like = make_result([])
    backend = make_backend(
        "draft_verify",
        options={"model": "/home/planted/small", "tree": "~/secret/tree.json"},
        chosen={"file": "/home/planted/secret/found.bin"},
    )
    drafter = TRAINED.model_copy(update={"id": "/home/planted/secret/head"})
    model = like.model.model_copy(update={"id": "/home/planted/secret/model"})
    head = ResultHead(like.suite, like.decoding, backend, model, drafter, like.environment, None)
    path = tmp_path / "a.json"
    with create_journal(tmp_path / "a.journal.jsonl", "now", {}) as journal:
        journal.append(make_run())
        entry = write_result(path, head, journal)
    assert "secret" not in path.read_text()
    assert "planted" not in path.read_text()
    assert entry.head.backend.options == {"model": "small", "tree": "tree.json"}
    assert entry.head.drafter is not None
    assert (entry.head.drafter.id, entry.head.model.id) == ("head", "model")
