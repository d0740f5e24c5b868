"""Where videos are written: links, pipes, devices, other names of stdout, and what must stay as it is."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from real_data import decoded, dheads, write_wav
from test_sample import TINY, untrained

from dheads.errors import DheadsError
from dheads.media.sound import load_waveform
from dheads.sampling import jobs
from dheads.sampling.lists import sample_all
from dheads.weights.checkpoints import save_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names of files only")

FRAMES = 3


@pytest.fixture(scope="module")
def media(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """face.jpg, s.wav of three frames, and weights.safetensors."""
    folder = tmp_path_factory.mktemp("media")
    write_wav(folder / "s.wav", load_waveform(examples / "speech.wav")[20_000:][: FRAMES * 640])
    save_checkpoint(folder / "weights.safetensors", untrained(TINY).state_dict(), TINY, {})
    shutil.copy(examples / "face.jpg", folder)
    return folder


@pytest.fixture(scope="module")
def expected(media: Path) -> np.ndarray:
    """The frames of the video that all tests make."""
    assert dheads(*command(media, media / "expected.mp4")).exit_code == 0
    return decoded(media / "expected.mp4")


def command(media: Path, output: object, *more: object) -> list[object]:
    weights = media / "weights.safetensors"
    options = ("--weights", weights, "--device", "cpu", "--steps", 1, "--quiet", *more)
    return ["sample", media / "face.jpg", media / "s.wav", "-o", output, *options]


def device(path: Path, kind: int, number: tuple[int, int]) -> Path:
    """A device node of our own, so that the machine's are safe."""
    try:
        os.mknod(path, kind | 0o666, os.makedev(*number))
        path.open("rb").close()
    except OSError:
        pytest.skip("this user may not make devices")
    return path


@contextmanager
def heard(pipe: Path | int, into: Path, most: int = -1) -> Iterator[None]:
    """Reads a pipe, all of it or its first bytes, while the block runs."""

    def read() -> None:
        with open(pipe, "rb", buffering=0) as file:
            into.write_bytes(file.readall() if most < 0 else file.read(most))

    reader = threading.Thread(target=read)
    reader.start()
    yield
    reader.join(timeout=60)
    assert not reader.is_alive()


def close_to(video: Path, expected: np.ndarray) -> bool:
    """The same pictures, perhaps through other settings of the codec."""
    frames = decoded(video)
    return frames.shape == expected.shape and np.abs(frames.astype(int) - expected).mean() < 8


# --- Written into


def test_a_named_pipe_gets_the_video(media: Path, expected: np.ndarray, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mov")
    with heard(tmp_path / "pipe.mov", tmp_path / "heard"):
        done = dheads(*command(media, tmp_path / "pipe.mov"))
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'pipe.mov'}\n"), done.stderr
    assert stat.S_ISFIFO((tmp_path / "pipe.mov").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heard", "pipe.mov"]
    assert close_to(tmp_path / "heard", expected)
    assert (tmp_path / "heard").read_bytes()[4:12] == b"ftypqt  "


def test_a_pipe_of_the_shell_gets_the_video(media: Path, expected: np.ndarray, tmp_path: Path) -> None:
    """As -o >(player -) gives it."""
    ends = os.pipe()
    with heard(ends[0], tmp_path / "heard"):
        done = dheads(*command(media, f"/dev/fd/{ends[1]}"))
        os.close(ends[1])
    assert done.exit_code == 0, done.stderr
    assert close_to(tmp_path / "heard", expected)


def test_a_reader_that_goes_is_one_sentence(media: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with heard(tmp_path / "pipe.mp4", tmp_path / "heard", most=0):
        done = dheads(*command(media, tmp_path / "pipe.mp4"))
    assert done.exit_code == 1
    assert done.stderr == f"error: cannot write {tmp_path / 'pipe.mp4'}: Broken pipe\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heard", "pipe.mp4"]


@pytest.mark.parametrize(("number", "code"), [((1, 3), 0), ((1, 7), 1)], ids=["null", "full"])
def test_a_device_is_written_to(media: Path, tmp_path: Path, number: tuple[int, int], code: int) -> None:
    node = device(tmp_path / "device", stat.S_IFCHR, number)
    done = dheads(*command(media, node))
    assert (done.exit_code, done.stdout) == (code, f"{node}\n" if code == 0 else "")
    assert done.stderr == ("" if code == 0 else f"error: cannot write {node}: No space left on device\n")
    assert list(tmp_path.iterdir()) == [node]
    assert stat.S_ISCHR(node.stat().st_mode)
    assert node.stat().st_rdev == os.makedev(*number)


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_points_to_is_written(media: Path, expected: np.ndarray, tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    link, real = tmp_path / "link.mp4", tmp_path / "far" / "real.mp4"
    link.symlink_to(real)
    if there:
        real.write_bytes(b"an older video")
    assert dheads(*command(media, link)).exit_code == 0
    assert link.is_symlink()
    assert [path.name for path in real.parent.iterdir()] == ["real.mp4"]
    assert np.array_equal(decoded(real), expected)


@pytest.mark.parametrize("reader", [True, False])
def test_another_name_of_stdout_is_stdout(
    warm: list[str], media: Path, expected: np.ndarray, tmp_path: Path, reader: bool
) -> None:
    """No line follows the video; what was in the file stays, and who listens to stderr does not matter."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1" if sys.platform == "linux" else "/dev/fd/1")
    words = [*warm, "-m", "dheads", *map(str, command(media, tmp_path / "stdout"))]
    words.remove("--quiet")
    video = tmp_path / "o.mp4"
    video.write_bytes(b"")
    with video.open("ab") as target:
        stdout = subprocess.PIPE if reader else target
        with subprocess.Popen(words, stdout=stdout, stderr=subprocess.PIPE) as running:
            running.stderr.close()
            if reader:
                video.write_bytes(running.stdout.read())
    assert running.returncode == 0
    assert (tmp_path / "stdout").is_symlink()
    assert close_to(video, expected)
    assert b"/stdout\n" not in video.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_video_into_a_full_stdout_is_one_sentence(warm: list[str], media: Path) -> None:
    words = [*warm, "-m", "dheads", *map(str, command(media, "-"))]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: cannot write <stdout>: No space left on device\n")


# --- Left as it is


def test_a_read_only_video_is_refused_before_any_work(media: Path, tmp_path: Path) -> None:
    video, link = tmp_path / "o.mp4", tmp_path / "link.mp4"
    video.write_bytes(b"an older video")
    video.chmod(0o444)
    link.symlink_to(video)
    for path in (video, link):
        done = dheads(*command(media, path), "--weights", "absent.safetensors")
        assert done.exit_code == 1
        assert done.stderr == f"error: cannot write {path}: it is read-only; choose another name, or make it writable\n"
    assert video.read_bytes() == b"an older video"
    assert link.is_symlink()


def test_a_disk_is_refused(media: Path, tmp_path: Path) -> None:
    # Numbers that no driver has.
    try:
        os.mknod(tmp_path / "disk.mp4", stat.S_IFBLK | 0o666, os.makedev(240, 77))
    except OSError:
        pytest.skip("this user may not make devices")
    done = dheads(*command(media, tmp_path / "disk.mp4"))
    assert done.stderr == f"error: cannot write {tmp_path / 'disk.mp4'}: it is no file; give the name of one\n"
    assert stat.S_ISBLK((tmp_path / "disk.mp4").stat().st_mode)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("o.webm", "o.webm: a video's name must end in .mp4, .m4v or .mov, as no other kind is made"),
        ("o", "o: a video's name must end in"),
        ("no/o.mp4", "no does not exist; create it or choose another"),
        ("face.jpg/o.mp4", "cannot write face.jpg/o.mp4: Not a directory"),
        (".", "cannot write .: it is a folder; give the name of a file"),
        ("link.mp4", "link.mp4 is the input itself; give the video another name"),
    ],
)
def test_a_bad_output_is_found_before_any_work(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(media / "face.jpg", "face.jpg")
    shutil.copy(media / "s.wav", "s.mp4")
    Path("link.mp4").symlink_to("s.mp4")
    done = dheads("sample", "face.jpg", "s.mp4", "-o", name, "--weights", "absent.safetensors")
    assert (done.exit_code, done.stdout) == (1, "")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


# --- Lists


def test_in_a_list_each_job_is_judged_by_itself(media: Path, expected: np.ndarray, tmp_path: Path) -> None:
    node = device(tmp_path / "null", stat.S_IFCHR, (1, 3))
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "locked.mp4").write_bytes(b"an older video")
    (tmp_path / "locked.mp4").chmod(0o444)
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    good = jobs.Job(media / "face.jpg", media / "s.wav", Path(), weights=str(media / "weights.safetensors"), steps=1)
    outputs = {
        node: None,
        tmp_path / "pipe.mp4": None,
        tmp_path / "link.mp4": None,
        tmp_path / "o.mov": None,
        tmp_path / "o.webm": "must end in .mp4, .m4v or .mov",
        tmp_path / "locked.mp4": "it is read-only",
    }
    todo = [replace(good, output=output) for output in outputs]
    with heard(tmp_path / "pipe.mp4", tmp_path / "heard"):
        found = {outcome.output: outcome for outcome in sample_all(todo, device="cpu", overwrite=True, progress=False)}
    for output, reason in outputs.items():
        assert (found[output].error is None) == (reason is None), found[output]
        assert (reason or "") in (found[output].error or "")
    assert stat.S_ISCHR(node.stat().st_mode)
    assert (tmp_path / "link.mp4").is_symlink()
    assert (tmp_path / "locked.mp4").read_bytes() == b"an older video"
    for video in ("heard", "real.mp4", "o.mov"):
        assert close_to(tmp_path / video, expected)
    again = list(sample_all([replace(good, output=tmp_path / "locked.mp4")], device="cpu", progress=False))
    assert [outcome.skipped for outcome in again] == [True], "a finished video may be read-only"


def test_what_a_killed_run_left_beside_a_links_file_goes(media: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s.mp4").symlink_to(tmp_path / "far" / "real.mp4")
    (tmp_path / "far" / ".real.mp4.0123abcd.part").touch()
    done = dheads(
        *("sample", media / "face.jpg", media / "s.wav", "--out-dir", tmp_path / "out", "--quiet"),
        *("--weights", media / "weights.safetensors", "--device", "cpu", "--steps", 1),
    )
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["real.mp4"]


def test_two_names_of_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    good = jobs.Job("f.jpg", "a.wav", tmp_path / "real.mp4")
    with pytest.raises(DheadsError, match=r"link\.mp4 would be written twice"):
        jobs.check_distinct([good, replace(good, output=tmp_path / "link.mp4")])
