"""Lip readers of a user's own, and the word error rate."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dheads.errors import DheadsError
from dheads.evaluation.lipreading import load_lip_reader, read_words, spoken_words, word_error_rate

VIDEO = Path("a clip; echo $HOME.mp4")


def command(code: str) -> str:
    """This Python as a reader's command."""
    return f"'{sys.executable}' -c '{code}' {{video}}"


# ---- Closed form ----


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


# ---- Readers ----


def test_a_command_gets_the_path_as_one_word() -> None:
    read = load_lip_reader(command("import sys; print(len(sys.argv), sys.argv[1])"))
    assert read(VIDEO) == f"2 {VIDEO.absolute()}"
    assert read(Path("--help")) == f"2 {Path('--help').absolute()}"


def test_a_reader_may_read_nothing() -> None:
    assert load_lip_reader(command("pass"))(VIDEO) == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('import sys; sys.exit("no face\\nno lips")', "fails on .* with exit code 1: no lips"),
        ('print("a\\nb")', "prints 2 lines for .*; it must print one"),
    ],
)
def test_a_command_that_fails_is_named_with_its_clip(code: str, message: str) -> None:
    with pytest.raises(DheadsError, match=message) as raised:
        load_lip_reader(command(code))(VIDEO)
    assert str(VIDEO) in str(raised.value)
    assert str(raised.value).startswith("the lip reader ")


def test_a_command_that_hangs_is_stopped_with_its_children() -> None:
    child = 'import subprocess, sys; subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])'
    begin = time.monotonic()
    with pytest.raises(DheadsError, match=r"takes more than 0.3 s for a clip"):
        load_lip_reader(command(child), timeout=0.3)(VIDEO)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reader", r"has no \{video\}"),
        ("no-such-program-anywhere {video}", "program 'no-such-program-anywhere' is not found"),
        ("reader '{video}", "cannot be taken apart: No closing quotation"),
        ("python:reader", "write python:MODULE:FUNCTION"),
        ("python:no_such_module:read", "cannot be loaded: ModuleNotFoundError"),
        ("python:math:no_such_function", "cannot be loaded: AttributeError"),
        ("python:math:pi", "is no function"),
    ],
)
def test_what_is_no_reader_is_refused(spec: str, message: str) -> None:
    with pytest.raises(DheadsError, match=message) as raised:
        load_lip_reader(spec)
    assert "\n" not in str(raised.value)


def test_a_function_of_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def read(video): return video.upper()\ndef fail(video): raise OSError('two\\nlines')\n"
    (tmp_path / "lips_of_mine.py").write_text(source + "def count(video): return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert load_lip_reader("python:lips_of_mine:read")(Path("a.mp4")) == "A.MP4"
    with pytest.raises(DheadsError, match=r"'python:lips_of_mine:fail' fails on a.mp4: OSError: two lines"):
        load_lip_reader("python:lips_of_mine:fail")(Path("a.mp4"))
    with pytest.raises(DheadsError, match=r"gives no text for a.mp4 but a int"):
        load_lip_reader("python:lips_of_mine:count")(Path("a.mp4"))


# ---- References ----


def test_words_beside_a_clip(tmp_path: Path) -> None:
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
