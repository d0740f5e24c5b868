"""Lip readers: commands and Python functions."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dheads.errors import DheadsError
from dheads.evaluation.lipreading import load_lip_reader

VIDEO = Path("a clip; echo $HOME.mp4")


def command(code: str) -> str:
    """This Python as a reader's command."""
    return f"'{sys.executable}' -c '{code}' {{video}}"


def test_a_command_gets_the_path_as_one_argument() -> None:
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
        ("reader '{video}", "cannot be split into arguments: No closing quotation"),
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
