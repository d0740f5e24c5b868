"""Spoken words from names, text files and tables, and the word error rate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dheads.errors import DheadsError
from dheads.evaluation.transcripts import read_words, spoken_words, word_error_rate

# ---- Word error rate ----


def test_word_error_rate() -> None:
    pytest.importorskip("jiwer")
    # One substitution, one deletion and one insertion of six words.
    said = ["the cat sat", "bin blue now"]
    assert word_error_rate(said, ["the dog sat", "bin now please"]) == pytest.approx(3 / 6)
    assert word_error_rate(said, said) == 0
    assert word_error_rate(["one"], ["two three four"]) == pytest.approx(3)
    assert word_error_rate(said, ["", ""]) == 1


def test_case_and_punctuation_are_no_errors() -> None:
    pytest.importorskip("jiwer")
    assert word_error_rate(["DON\u2019T, please -- stop!"], ["don't please stop"]) == 0
    assert word_error_rate(["dont"], ["don't"]) == 1


def test_references_must_have_words() -> None:
    pytest.importorskip("jiwer")
    for references in ([], ["..."], ["a", ""]):
        with pytest.raises(DheadsError, match="without words in its reference"):
            word_error_rate(references, [""] * len(references))
    with pytest.raises(DheadsError, match="there are 1 references, but 2 clips were read"):
        word_error_rate(["a"], ["a", "b"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(DheadsError, match=r"needs the package jiwer: pip install 'dheads\[eval\]'"):
        word_error_rate(["a"], ["a"])


# ---- Spoken words ----


def test_words_of_a_clip(tmp_path: Path) -> None:
    assert spoken_words(tmp_path / "ABOUT_00001.mp4") == "ABOUT"  # LRW
    assert spoken_words(tmp_path / "clip.mp4") is None
    (tmp_path / "clip.txt").write_text("bin blue at\nL nine\n")
    assert spoken_words(tmp_path / "clip.mp4") == "bin blue at\nL nine"
    (tmp_path / "clip.txt").write_text("Text:  WHEN YOU'RE COOKING\nConf:   3\n")
    assert spoken_words(tmp_path / "clip.mp4") == "WHEN YOU'RE COOKING"
    (tmp_path / "clip.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DheadsError, match=r"clip.txt is no UTF-8 text"):
        spoken_words(tmp_path / "clip.mp4")


def test_words_in_a_table(tmp_path: Path) -> None:
    table = tmp_path / "words.csv"
    table.write_text('clip,words\na/b,"bin, blue"\nc,now\n')
    assert read_words(table) == {"a/b": "bin, blue", "c": "now"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks the columns clip and words"),
        (b"clip,said\na,b\n", "lacks the columns clip and words"),
        (b"clip,words\na,\n", "has no words for the clip 'a'"),
        (b"clip,words\na\n", "has no words for the clip 'a'"),
        (b'clip,words\na,"b', "is no CSV file"),
        (b"\x80", "is no UTF-8 text"),
        (b"x" * 1_000_001, "has more than 1000000 bytes"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    table = tmp_path / "words.csv"
    table.write_bytes(content)
    with pytest.raises(DheadsError, match=message) as raised:
        read_words(table)
    assert str(table) in str(raised.value)


def test_an_absent_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match=r"cannot read .*words.csv: No such file"):
        read_words(tmp_path / "words.csv")
