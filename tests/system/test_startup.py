"""Streams that are closed, full or left by their reader; missing libraries and memory; a deleted working folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dheads.system.startup import lacking

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shells only")

FULL = Path("/dev/full")
DHEADS = (sys.executable, "-m", "dheads")
full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


def run(command: tuple[str, ...], shell: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program by a shell with the given redirections."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(["sh", "-c", f'"$@" {shell}', "sh", *command], text=True, check=False, **streams)


# --- Streams

# A program with progress, messages and a result.
WORK = """
import contextlib, os, sys
from dheads.system.startup import open_streams
open_streams()
from tqdm import tqdm
import typer
with contextlib.suppress(OSError):
    os.write(2, b"a library's message\\n")
for _ in tqdm(range(3), mininterval=0):
    typer.echo("note " * 20_000, err=True)
    sys.stderr.flush()
with open(sys.argv[1], "wb") as file:
    assert file.fileno() > 2, "otherwise what libraries write to stderr would be in it"
typer.echo("done")
"""


@pytest.mark.parametrize(
    "redirection",
    ["2>&-", "<&- 2>&-", pytest.param("2>/dev/full", marks=full)],
)
def test_a_lost_stderr_does_not_end_the_program(tmp_path: Path, redirection: str) -> None:
    done = run((sys.executable, "-c", WORK, str(tmp_path / "o")), redirection)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert (tmp_path / "o").exists()


def test_a_reader_of_stderr_may_go(tmp_path: Path) -> None:
    command = (sys.executable, "-c", WORK, str(tmp_path / "o"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stderr.read(30)
        running.stderr.close()
        assert running.stdout.read() == b"done\n"
    assert running.returncode == 0


def test_a_good_stderr_gets_everything(tmp_path: Path) -> None:
    done = run((sys.executable, "-c", WORK, str(tmp_path / "o")))
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "a library's message\n" in done.stderr
    assert done.stderr.count("note " * 20_000) == 3
    assert "100%" in done.stderr


@full
def test_a_full_stdout_is_one_sentence() -> None:
    for arguments in (["--version"], ["sample", "--help"]):
        done = run((*DHEADS, *arguments), ">/dev/full")
        assert done.returncode == 1
        assert done.stderr == "error: cannot write to stdout: No space left on device (what was made is complete)\n"


def test_a_closed_stdout_is_no_error() -> None:
    done = run((*DHEADS, "--version"), ">&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_streams_that_are_closed_take_no_video(tmp_path: Path) -> None:
    args = (*DHEADS, "sample", "face.jpg", "speech.wav", "-o", "-")
    done = run(args, ">&-")
    assert done.returncode == 1
    assert done.stderr == "error: the output is -, but stdout is closed; pipe the video to a player or into a file\n"
    done = run((*DHEADS, "sample", "--jobs", "-"), "<&-")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the list from stdin: the first line must name the columns")


# --- What the machine lacks

NO_LIBGL = 'raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")'
# Two commands in one process, which imports PyTorch once; prints their exit codes.
COMMANDS = """
from dheads.cli import app
for args in (["sample", "face.jpg", "speech.wav", "-o", "out.mp4"], ["prepare", "raw", "--out", "data"]):
    try:
        app(args, prog_name="dheads")
    except SystemExit as end:
        print(end.code)
"""


def test_without_libgl_one_sentence_shows_two_ways_out(tmp_path: Path) -> None:
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text(NO_LIBGL)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = run((sys.executable, "-c", COMMANDS), env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1\n1\n")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("error: opencv-python needs the system library libGL.so.1 (cannot open shared object")
        assert "apt-get install libgl1 libglib2.0-0" in line
        assert "pip uninstall opencv-python, then pip install opencv-python-headless" in line


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            "is too small (libtorch_cpu.so: failed to map segment from shared object): close other programs",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.\nmore"),
            "(DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.)",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "(CUDA out of memory. Tried to allocate"),
        (MemoryError(), "(out of memory)"),
    ],
)
def test_too_little_memory_is_one_sentence(error: Exception, reason: str) -> None:
    assert reason in lacking(error)
    assert "\n" not in lacking(error)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError("libc10_cuda.so: cannot open shared object file: No such file or directory"),
            "libc10_cuda.so: cannot open shared object file: No such file or directory",
        ),
        (OSError("/env/torchaudio/lib/libtorchaudio.so: undefined symbol: x"), "libtorchaudio.so: undefined symbol: x"),
        (
            RuntimeError(
                "Detected that PyTorch and TorchAudio were compiled with different CUDA versions. PyTorch has"
            ),
            "they are for different CUDA versions",
        ),
    ],
)
def test_torchaudio_of_another_torch_is_one_sentence(error: Exception, reason: str) -> None:
    def loading() -> None:
        exec("raise error", {"__name__": "torchaudio._extension.utils", "error": error})

    with pytest.raises(type(error)) as raised:
        loading()
    assert lacking(raised.value) == (
        f"torchaudio does not fit the installed torch ({reason}): install both from one source (pip install "
        "--force-reinstall torch torchaudio, with the same --index-url for both)"
    )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("No module named 'av'"),
        ImportError("libc10.so: cannot open shared object file: No such file or directory"),
        ImportError("/tmp/x.so: failed to map segment from shared object: Operation not permitted"),
        OSError(2, "No such file or directory", "a.so"),
        RuntimeError("shapes differ"),
    ],
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert lacking(error) is None


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    move = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); os.execv(sys.executable, sys.argv[2:])"
    done = run((sys.executable, "-c", move, str(gone), *DHEADS, "sample", "f.jpg", "a.wav", "-o", "o.mp4"))
    assert done.returncode == 1
    assert done.stderr == "error: the working folder was deleted; change to one that exists\n"
