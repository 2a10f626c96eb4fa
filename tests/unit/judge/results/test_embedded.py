"""A report holds its results byte for byte, and is read wherever result files are."""

from __future__ import annotations

import json
import lzma
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.errors import InputError
from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import read_results
from spdbench.judge.results import embedded
from spdbench.judge.results.embedded import BEGIN, END, EmbeddedFile, embed, is_report, read_report

FIXTURES = Path(__file__).parents[3] / "fixtures" / "results"
FILES = [FIXTURES / f"{name}.json" for name in ("vanilla", "spd_oracle", "eagle_with_failure")]


def page(folder: Path, element: str) -> Path:
    path = folder / "report.html"
    path.write_text(f"<!doctype html><title>x</title>\n{element}\n</html>", encoding="utf-8")
    return path


def element(**changes: Any) -> str:
    raw = b"some bytes"
    found = {
        "schema": embedded.SCHEMA,
        "files": [{"name": "a.json", "bytes": len(raw), "differences": False}],
        "compression": "xz",
        "base64": b64encode(lzma.compress(raw)).decode(),
    }
    return BEGIN + json.dumps(found | changes) + END


def entry(num_bytes: int) -> dict[str, Any]:
    return {"name": "a.json", "bytes": num_bytes, "differences": False}


def test_report_compares_like_the_files_that_it_holds(tmp_path: Path) -> None:
    report = page(tmp_path, embed([EmbeddedFile(file.name, file.read_bytes()) for file in FILES]))
    [ours], [theirs] = compare(read_results([report])), compare(read_results(FILES))
    assert [row.label for row in ours.rows] == [row.label for row in theirs.rows]
    assert [dict(row.metrics) for row in ours.rows] == [dict(row.metrics) for row in theirs.rows]
    assert [row.file for row in ours.rows] == [f"{report}/{file.name}" for file in FILES]


@given(st.lists(st.tuples(st.text("abc.-", max_size=9), st.binary(max_size=300)), max_size=4))
def test_every_byte_comes_back(files: list[tuple[str, bytes]]) -> None:
    found = embedded._ELEMENT.search(embed([EmbeddedFile(*file) for file in files]).encode())
    assert found is not None
    assert b"<" not in found[1]


TIMES = st.lists(st.text("0123456789,-", max_size=30), max_size=3)
SPANS = TIMES.map(lambda each: "".join(f'"start_ns":[{times}],"end_ns":[{times[::-1]}]' for times in each).encode())


@given(
    raw=st.binary(max_size=300)
    | TIMES.map(lambda each: "".join(f'"t_ns":[{times}]' for times in each).encode())
    | SPANS
)
def test_files_come_back_in_their_order(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    files = [EmbeddedFile("a.json", raw), EmbeddedFile("b.json", b"</script><!--"), EmbeddedFile("c.json", b"")]
    assert read_report(page(tmp_path_factory.mktemp("page"), embed(files))) == files


def test_times_are_kept_as_differences(tmp_path: Path) -> None:
    raw = b'{"t_ns":[5,7,12],"x":[1]}'
    text = embed([EmbeddedFile("a.json", raw)])
    assert '"differences": true' in text
    packed = json.loads(text.removeprefix(BEGIN).removesuffix(END))["base64"]
    assert b'"t_ns":[5,2,5]' in lzma.decompress(b64decode(packed))
    assert read_report(page(tmp_path, text)) == [EmbeddedFile("a.json", raw)]
    for odd in (b'{"t_ns":[05]}', b'{"t_ns":[1,,2]}', b'"t_ns":[' + b"9" * 5000 + b"]"):
        text = embed([EmbeddedFile("a.json", odd)])
        assert '"differences": false' in text
        assert read_report(page(tmp_path, text)) == [EmbeddedFile("a.json", odd)]


def test_spans_are_kept_as_gaps_and_durations(tmp_path: Path) -> None:
    raw = b'{"start_ns":[10,17,12],"end_ns":[15,20,30]}'
    text = embed([EmbeddedFile("a.json", raw)])
    assert '"gaps": true' in text
    packed = json.loads(text.removeprefix(BEGIN).removesuffix(END))["base64"]
    assert lzma.decompress(b64decode(packed)) == b'{"start_ns":[10,2,-8],"end_ns":[5,3,18]}'
    assert read_report(page(tmp_path, text)) == [EmbeddedFile("a.json", raw)]
    for odd in (
        b'{"start_ns":[05],"end_ns":[6]}',
        b'{"start_ns":[1,2],"end_ns":[3]}',
        b'{"start_ns":[1],"end_ns":[,]}',
    ):
        text = embed([EmbeddedFile("a.json", odd)])
        assert '"gaps": false' in text
        assert read_report(page(tmp_path, text)) == [EmbeddedFile("a.json", odd)]


def test_folders_in_a_name_are_dropped(tmp_path: Path) -> None:
    [file] = read_report(
        page(tmp_path, element(files=[{"name": "../../etc/passwd", "bytes": 10, "differences": False}]))
    )
    assert file.name == "passwd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no report of spdbench"),
        (element(schema="spdbench.report/2"), "schema spdbench.report/2; this spdbench reads spdbench.report/1"),
        (BEGIN + "{not JSON" + END, "its results are not JSON"),
        (BEGIN + "[]" + END, "its results are not JSON"),
        (element(compression="zip"), "compression"),
        (element().replace('"compression"', '"base64": "", "compression"'), "damaged"),
        (element(base64="@@@"), "damaged"),
        (element(base64=b64encode(b"no xz").decode()), "damaged"),
        (element(files=[entry(9)]), "damaged"),
        (element(files=[entry(11)]), "damaged"),
        (element(files=[entry(-1)]), "files.0.bytes"),
        (element(files=[entry(2**28), entry(2**28)]), "damaged"),
    ],
    ids=[
        "none",
        "version",
        "no JSON",
        "a list",
        "packing",
        "twice",
        "base64",
        "xz",
        "short",
        "long",
        "negative",
        "huge",
    ],
)
def test_what_is_no_report_is_refused_with_one_message(tmp_path: Path, content: str, message: str) -> None:
    path = page(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        read_report(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_page_that_is_cut_off_says_so_unless_its_results_are_whole(tmp_path: Path) -> None:
    text = page(tmp_path, element()).read_text()
    for size in range(0, text.index(END) + len(END), 40):
        (tmp_path / "cut.html").write_text(text[:size])
        with pytest.raises(InputError, match="cut off: its end is missing"):
            read_report(tmp_path / "cut.html")
    (tmp_path / "cut.html").write_text(text.removesuffix("</html>"))
    assert read_report(tmp_path / "cut.html") == read_report(tmp_path / "report.html")


def test_little_that_unpacks_to_much_stays_little(tmp_path: Path) -> None:
    bomb = b64encode(lzma.compress(bytes(2**24))).decode()
    with pytest.raises(InputError, match="damaged"):
        read_report(page(tmp_path, element(base64=bomb)))


def test_result_in_a_report_is_checked_like_a_file(tmp_path: Path) -> None:
    report = page(tmp_path, embed([EmbeddedFile("a.json", b'{"schema": "spdbench.result/9"}')]))
    with pytest.raises(InputError, match=r"report.html/a.json: has schema spdbench.result/9, written by a newer"):
        read_results([report])


def test_reports_are_known_by_their_name() -> None:
    assert is_report(Path("a/report.html"))
    assert is_report(Path("REPORT.HTM"))
    assert not is_report(Path("report.html.json"))
