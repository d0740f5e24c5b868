"""Every command and all Python code of the README and the manual, run unchanged but for faster weights and settings."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import manual
import numpy as np
import pytest
from manual import blocks, calls, commands, inputs, parsed
from PIL import Image
from real_data import cut, decoded, dheads, in_this_process
from test_motion_video import CODES, moving_network
from test_pipes import FRAMES, media, options  # noqa: F401  (a fixture)
from test_sample import TINY

from dheads.config import override, preset
from dheads.dataset.extraction import Detector
from dheads.media.writing import write_video
from dheads.sampling import talker
from dheads.weights.checkpoints import save_checkpoint

pytest_plugins = "real_data"

# Part of a command -> why it is not run. Its options are checked all the same.
NOT_RUN = {
    "torchrun": "needs several GPUs",
    "--accept-license": "downloads weights",
    "--metric": "downloads weights",
    "--lip-reader": "needs a lip reader",
    "$SLURM": "is one task of many",
}
# Part of a command -> the videos that it writes; of all others, that of -o, or any.
VIDEOS = {
    "a.wav speech.mp3": ["out/a.mp4", "out/speech.mp4"],
    "--takes 3": ["out-1.mp4", "out-2.mp4", "out-3.mp4"],
    "--shard 1/2": ["first.mp4"],
    "xargs -0": ["out/a.mp4", "out/b.mp4", "out/speech.mp4"],
    "jobs.csv |": ["first.mp4", "out/first.mp4", "out/second.mp4", "second.mp4"],
    "| dheads sample --jobs -": ["a.mp4", "b.mp4", "examples/speech.mp4"],
    "| ffplay -": ["played.mp4"],
    "parallel": ["a.mp4", "b.mp4"],
    "make a.mp4": ["a.mp4"],
}
# Part of some Python code -> what it prints.
PRINTED = {"np.stack": rf"\({FRAMES}, 256, 256, 3\)", "on_frame": rf"{FRAMES} of {FRAMES}", "glob": r"a\.mp4\nb\.mp4\n"}

COMMANDS = list(dict.fromkeys(command for page in manual.RUN for command in commands(page)))
TO_RUN = [command for command in COMMANDS if not any(part in command for part in NOT_RUN)]
PLAIN = [command for command in TO_RUN if re.match("dheads ", command) and not re.search("[|<>&;*]", command)]
SAMPLING = [command for command in PLAIN if calls(command)[0][0] == "sample"]
DATASET = [c for c in TO_RUN if calls(c) and calls(c)[0][0] in ("prepare", "train", "eval")]  # prepare .. eval
SHELL = [command for command in TO_RUN if command not in (*PLAIN, *DATASET)]
CODE = [(page, code) for page in manual.RUN for code in blocks(page, "python")]


def name(command: str) -> str:
    return command.splitlines()[0][:70]


@pytest.mark.parametrize("page", manual.ALL)
def test_options(page: str) -> None:
    """The parser ends the process for an option that does not exist, or a value that it does not take."""
    for command in commands(page):
        for args in calls(command):
            parsed(args)


def test_the_tables_above_are_about_the_pages() -> None:
    pages = "\n".join([*COMMANDS, *(code for _, code in CODE)])
    assert [part for part in (*NOT_RUN, *VIDEOS, *PRINTED) if part not in pages] == []
    assert len(SAMPLING) > 5
    assert len(DATASET) > 5
    assert len(SHELL) > 5


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
SOURCES = {".jpg": "face.jpg", ".wav": "short.wav", ".mp3": "speech.mp3", ".mp4": "face.mp4"}
ALWAYS = ["examples/face.jpg", "examples/speech.wav", "face.jpg", "speech.mp3", "a.wav", "b.wav"]


@pytest.fixture(scope="module")
def files(media: Path) -> Path:  # noqa: F811
    """The files of `media`, a video of the face, and weights whose head moves and whose sound may be guided."""
    config = override(TINY, CODES)
    config = override(config, {"extensions": {"sound": {"dropout": 0.1}}})
    save_checkpoint(media / "weights.safetensors", moving_network(config).state_dict(), config, {})
    face = np.asarray(Image.open(media / "face.jpg"))
    write_video(media / "face.mp4", [face] * 15, None)
    return media


def fill(folder: Path, files: Path, names: list[str]) -> None:
    """Put what the commands read into the folder."""
    (folder / "out").mkdir()
    for file in names:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(files / SOURCES[Path(file).suffix], folder / file)
    for file, language in (("jobs.csv", "csv"), ("Makefile", "make")):
        (folder / file).write_text("".join(blocks("docs/cli.md", language)))


@pytest.fixture(scope="module")
def programs(files: Path, warm: list[str]) -> Path:
    """A folder of programs: dheads with fast settings, a player that saves its input, stubs of all that installs."""
    folder = files / "bin"
    quick = shlex.join(options(files))
    program(folder / "dheads", f'[ "$1" = sample ] && set -- "$@" {quick}\nexec {shlex.join(warm)} -m dheads "$@"')
    program(folder / "ffplay", "cat > played.mp4")
    program(folder / "python3", "mkdir -p .venv/bin && touch .venv/bin/activate")
    for other in ("pip", "apt-get", "pytest"):
        program(folder / other, "true")
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


def videos(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4")}


def assert_made(folder: Path, command: str, before: set[str]) -> None:
    made = sorted(videos(folder) - before)
    for part, expected in VIDEOS.items():
        if part in command:
            assert made == expected
    if named := [parsed(args)["output"] for args in calls(command) if "-o" in args]:
        assert made == [str(path) for path in named] or any(part in command for part in VIDEOS)
    assert made or not any(args[0] == "sample" for args in calls(command))
    for video in made:
        assert len(decoded(folder / video)) >= FRAMES


@pytest.mark.parametrize("command", SAMPLING, ids=name)
def test_calls(command: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of dheads alone is run in this process, which saves starting one."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, files, [*ALWAYS, *(path.as_posix() for path in inputs(command) if path)])
    before = videos(tmp_path)
    done = dheads(*calls(command)[0], *options(files))
    assert done.exit_code == 0, done.stderr
    assert_made(tmp_path, command, before)


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("command", SHELL, ids=name)
def test_shell(command: str, files: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("find", "xargs", "make"):
        if needed in command.split() and shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, files, ALWAYS)
    done = in_bash(command, programs)
    assert done.returncode == 0, done.stderr
    assert_made(tmp_path, command, set())
    if command == "make a.mp4":
        assert "up to date" in in_bash(command, programs).stdout


@pytest.mark.parametrize(("page", "code"), CODE, ids=[f"{page}-{k}" for k, (page, _) in enumerate(CODE)])
def test_python(
    page: str,
    code: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = override(TINY, CODES)
    monkeypatch.setattr(talker, "load_model", lambda *_: (moving_network(config), config, {}))
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, files, ["examples/face.jpg", "examples/speech.wav", "face.jpg", "a.wav", "b.wav"])
    if "glob" not in code:
        shutil.copy(files / "short.wav", tmp_path / "speech.wav")
    exec(compile(code, page, "exec"), {})
    printed, made = capsys.readouterr().out, videos(tmp_path)
    assert printed or made
    for video in made:
        assert len(decoded(tmp_path / video)) == FRAMES
    for part, shown in PRINTED.items():
        if part in code:
            assert re.search(shown, printed)


# --- prepare, train, eval


def test_from_raw_videos_to_a_report(
    shared: Path, quick_training: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Path
) -> None:
    for speaker in "abc":
        cut(shared / "data" / "grid" / "other_lbbc2a.mp4", tmp_path / "raw" / speaker / "one.mp4", 6)
    for folder in ("generated", "real"):
        shutil.copytree(tmp_path / "raw" / "a", tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch, Detector(preset("small"), "cpu"))
    order = {"prepare": 0, "train": 1, "eval": 2}
    for command in sorted(DATASET, key=lambda command: order[calls(command)[0][0]]):
        assert_works(command)


def assert_works(command: str) -> None:
    """A command with a dataset does what it should; what it prints to a file is written there."""
    (args,) = calls(command)
    if "--votes" in args:
        write_votes(Path("report/turing-key.json"), [Path("a.json"), Path("b.json")])
    done = dheads(*args, *faster(args))
    assert done.exit_code == 0, f"{command}: {done.stderr}"
    assert done.stdout
    if redirected := re.search(r"> (\S+)$", command):
        Path(redirected[1]).write_text(done.stdout)
    shown = done.stderr.replace(os.sep, "/")
    if args[0] == "prepare":
        assert "look at data/contact-sheet.png\n" in shown
        assert Path("data/contact-sheet.png").is_file()
    elif args[0] == "eval" and "--out" in args:
        assert "look at report/report.html\n" in shown
        assert Path("report/report.html").is_file()
    elif args == ["train", "--data", "data"]:
        assert Path(done.stdout.strip()) == Path("data-run/weights.safetensors")
        assert Path("data-run/weights.safetensors").is_file()


# A training of one step, with a network that computes next to nothing.
SMALL = [
    f"--set={setting}"
    for setting in (
        "optimisation.steps=1",
        "optimisation.batch_size=2",
        "run.sample_clips=0",
        "network.model_channels=32",
        "network.head_channels=32",
        "network.channel_mult=[1]",
    )
]


def faster(args: list[str]) -> list[str]:
    """Options that make a command quick; all trainings but the plain one only say what they would cost."""
    if args[0] == "train":
        if "--print-config" in args:
            return []
        small = ["--device", "cpu", *SMALL]
        return small if args == ["train", "--data", "data"] else [*small, "--dry-run"]
    turing = ["--turing", "1"] if "--turing" in args else []
    return ["--device", "cpu", *(["--steps", "1", "--limit", "1"] if "--weights" in args else []), *turing]


def write_votes(key: Path, files: list[Path]) -> None:
    """Two people's votes in the Turing test, all right."""
    test = json.loads(key.read_text())
    votes = {token: clip["kind"] for token, clip in test["clips"].items()}
    for file in files:
        file.write_text(json.dumps({"test": test["test"], "voter": file.stem, "votes": votes}))
