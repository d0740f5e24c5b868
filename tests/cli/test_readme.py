"""Every command and the Python code of the README, run unchanged but for faster weights and settings."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from real_data import Prepared, cut, decoded, dheads, in_this_process
from test_pipes import FRAMES, media, options  # noqa: F401  (a fixture)
from test_sample import TINY, untrained
from typer.testing import Result

from dheads.config import preset
from dheads.dataset.extraction import Detector
from dheads.extensions import lips
from dheads.sampling import talker

pytest_plugins = "real_data"

README = (ROOT / "README.md").read_text(encoding="utf-8")
LIST = """face,audio,output,seed
face.jpg,a.wav,first.mp4,1
face.jpg,b.wav,second.mp4,2
"""
# Part of a command -> the videos that it writes, in a folder with examples/, face.jpg, speech.mp3, a.wav, b.wav,
# jobs.csv, out/ and Makefile.
DHEADS_COMMANDS = {
    "--size 256 --seed 1": ["out.mp4"],
    "--paste": ["out.mp4"],
    "a.wav speech.mp3": ["out/a.mp4", "out/speech.mp4"],
}
PIPELINES = {
    "pip install . && dheads sample": ["out.mp4"],
    "xargs -0": ["out/a.mp4", "out/b.mp4", "out/speech.mp4"],
    "jobs.csv |": ["first.mp4", "out/first.mp4", "out/second.mp4", "second.mp4"],
    "| dheads sample --jobs -": ["a.mp4", "b.mp4", "examples/speech.mp4"],
    "| ffplay -": ["played.mp4"],
    "parallel": ["a.mp4", "b.mp4"],
    "make a.mp4": ["a.mp4"],
}
TRAIN = "dheads train"
# Part of a command -> (a file that it writes, options that make it faster); they run in this order.
DATASET_COMMANDS = {
    "dheads prepare": ("data/contact-sheet.png", []),
    "dheads eval --weights": ("report/report.html", ["--device", "cpu", "--steps", "1"]),
    "dheads eval generated": ("report/report.html", []),
}
LEFT_OUT = {
    "&& pytest": "runs the tests",
    "--weights crema": "downloads 0.9 GB",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@cache
def commands() -> list[str]:
    """The commands of the shell blocks: one per line, but a loop is one command."""
    found, loops = [], 0
    for line in "".join(blocks("sh")).splitlines():
        found.append(f"{found.pop()}\n{line}" if loops else line)
        loops += len(re.findall(r"\bdo\b", line)) - len(re.findall(r"\bdone\b", line))
    return [command for command in found if not command.startswith("#")]


def called(part: str, quick: list[str]) -> Result:
    """Run a command that calls only dheads in this process, which saves starting Python."""
    name, *args = shlex.split(command_with(part))
    assert name == "dheads"
    return dheads(*args, *quick)


def command_with(part: str) -> str:
    (command,) = (command for command in commands() if part in command)
    return command


def test_every_command_is_covered() -> None:
    assert sorted(commands()) == sorted(
        map(command_with, [*DHEADS_COMMANDS, *PIPELINES, *DATASET_COMMANDS, TRAIN, *LEFT_OUT])
    )


# --- sample


def program(path: Path, command: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{command}\n")
    path.chmod(0o755)


# A substitute for GNU parallel that knows {}, {.} and :::.
PARALLEL = r"""
while [ "$1" != ::: ]; do command+=("$1"); shift; done
for each in "${@:2}"; do
    line=("${command[@]//\{\}/$each}")
    "${line[@]//\{.\}/${each%.*}}" || exit 1
done
"""


SOURCES = {
    "examples/face.jpg": "face.jpg",
    "examples/speech.wav": "short.wav",
    "face.jpg": "face.jpg",
    "speech.mp3": "speech.mp3",
    "a.wav": "short.wav",
    "b.wav": "short.wav",
}


@pytest.fixture
def folder(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The working directory, with the files that the commands use."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "out").mkdir()
    for name, source in SOURCES.items():
        shutil.copy(media / source, tmp_path / name)
    (tmp_path / "jobs.csv").write_text(LIST)
    (tmp_path / "Makefile").write_text("".join(blocks("make")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def programs(media: Path) -> Path:  # noqa: F811
    """A folder of programs: dheads with fast settings, a player that saves its input, stubs of python3 and pip."""
    folder = media / "bin"
    program(folder / "dheads", f'"{sys.executable}" -m dheads "$@" {shlex.join(options(media))}')
    program(folder / "ffplay", "cat > played.mp4")
    program(folder / "python3", "mkdir -p .venv/bin && touch .venv/bin/activate")
    program(folder / "pip", "true")
    if shutil.which("parallel") is None:
        program(folder / "parallel", PARALLEL)
    return folder


def in_bash(command: str, programs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_made(folder: Path, videos: list[str]) -> None:
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4")) == videos
    for name in videos:
        assert len(decoded(folder / name)) >= FRAMES


@pytest.mark.parametrize("part", DHEADS_COMMANDS)
def test_calls(folder: Path, media: Path, part: str) -> None:  # noqa: F811
    done = called(part, options(media))
    assert done.exit_code == 0, done.stderr
    assert_made(folder, DHEADS_COMMANDS[part])


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("part", PIPELINES)
def test_recipes(folder: Path, programs: Path, part: str) -> None:
    command = command_with(part)
    for needed in ("find", "xargs", "make"):
        if needed in command.split() and shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    done = in_bash(command, programs)
    assert done.returncode == 0, done.stderr
    assert_made(folder, PIPELINES[part])
    if part == "make a.mp4":
        assert "up to date" in in_bash(command, programs).stdout


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(talker, "load_model", lambda *_: (untrained(TINY), TINY, {}))
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert len(decoded(folder / "out.mp4")) == FRAMES
    first, *shapes = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{FRAMES} frames in [\d.]+ s", first)
    assert shapes == ["(32, 32, 3)"] * FRAMES


# --- prepare, eval, train


def test_raw_videos_to_a_report(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for speaker in "abc":
        cut(shared / "data" / "grid" / "other_lbbc2a.mp4", tmp_path / "raw" / speaker / "one.mp4", 12)
    for name in ("generated", "real"):
        shutil.copytree(tmp_path / "raw" / "a", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch, Detector(preset("small"), "cpu"))
    for part, (made, quick) in DATASET_COMMANDS.items():
        done = called(part, quick)
        assert done.exit_code == 0, done.stderr
        assert f"look at {made}\n" in done.stderr.replace(os.sep, "/")
        assert (tmp_path / made).is_file()


def test_training(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(prepared.data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lips, "_RIDGES", (1.0,))  # one penalty and one fold: faster
    monkeypatch.setattr(lips, "_FOLDS", 1)
    done = called(TRAIN, ["--device", "cpu", "--set", "training.steps=1"])
    assert done.exit_code == 0, done.stderr
    assert Path(done.stdout.strip()) == Path("data-run/weights.safetensors")
    assert (tmp_path / "data-run" / "weights.safetensors").is_file()
