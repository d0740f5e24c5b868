"""`dheads sample` as one program among others: pipes and signals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from real_data import decoded, dheads, write_wav
from test_sample import TINY, untrained

from dheads.media.sound import load_waveform
from dheads.weights.checkpoints import save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell's matters")

FRAMES = 3
COLD = [sys.executable]  # imports all it needs, which takes seconds


@pytest.fixture(scope="module")
def media(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """face.jpg, short.wav and speech.mp3 of a few frames, long.wav of seconds, and weights.safetensors."""
    folder = tmp_path_factory.mktemp("media")
    speech = load_waveform(examples / "speech.wav")
    write_wav(folder / "long.wav", speech.repeat(2)[:80_000])
    write_wav(folder / "short.wav", speech[20_000:][: FRAMES * 640])
    with av.open(str(folder / "short.wav")) as source, av.open(str(folder / "speech.mp3"), "w") as target:
        stream = target.add_stream("libmp3lame", rate=16_000, layout="mono")
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    save_checkpoint(folder / "weights.safetensors", untrained(TINY).state_dict(), TINY, {})
    shutil.copy(examples / "face.jpg", folder)
    return folder


def options(media: Path) -> list[str]:
    return ["--weights", str(media / "weights.safetensors"), "--device", "cpu", "--steps", "1"]


def started(
    program: list[str], media: Path, temporary: Path, *args: object, **streams: object
) -> subprocess.Popen[bytes]:
    """A dheads of its own, with its temporary files in a folder of its own, and Ctrl-C as in a terminal."""
    temporary.mkdir()
    return subprocess.Popen(
        [*program, "-m", "dheads", "sample", *map(str, args), *options(media)],
        env={**os.environ, "TMPDIR": str(temporary)},
        **streams,
    )


# --- Pipes


def test_sound_from_a_pipe_and_video_into_one(media: Path, tmp_path: Path) -> None:
    with (media / "speech.mp3").open("rb") as sound, (tmp_path / "piped.mp4").open("wb") as video:
        args = (media / "face.jpg", "-", "-o", "-", "--audio", "copy")
        done = started(COLD, media, tmp_path / "tmp", *args, stdin=sound, stdout=video)
        assert done.wait() == 0
    assert list((tmp_path / "tmp").iterdir()) == []
    args = ("sample", media / "face.jpg", media / "speech.mp3", "-o", tmp_path / "file.mp4", *options(media), "--quiet")
    assert dheads(*args).exit_code == 0
    piped, file = decoded(tmp_path / "piped.mp4").astype(int), decoded(tmp_path / "file.mp4")
    assert piped.shape == file.shape
    assert np.abs(piped - file).mean() < 8, "the same pictures, through two settings of the codec"
    heard, said = load_waveform(tmp_path / "piped.mp4"), load_waveform(media / "speech.mp3")
    assert (heard[: len(said)] - said).abs().max() < 1e-3, "copied"


def test_a_player_starts_before_the_end_and_may_stop_early(warm: list[str], media: Path, tmp_path: Path) -> None:
    # So large that the pipe is full long before the end.
    args = (media / "face.jpg", media / "long.wav", "-o", "-", "--quiet", "--size", 256)
    running = started(warm, media, tmp_path / "tmp", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with running:
        beginning = b""
        while beginning.count(b"moof") < 2:
            beginning += running.stdout.read1()
        assert running.poll() is None, "still at work"
        (tmp_path / "beginning.mp4").write_bytes(beginning)
        running.stdout.close()
        assert running.wait() == -signal.SIGPIPE
        assert running.stderr.read() == b""
    with av.open(str(tmp_path / "beginning.mp4")) as container:
        assert {stream.type for stream in container.streams} == {"video", "audio"}
        assert next(container.decode(video=0)).width == 256
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing(
    warm: list[str], media: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("it is ignored, as by nohup, and programs inherit that")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "o.mp4"
    target.write_bytes(b"an older video")
    # A list and a single job, in turn.
    where = ("--out-dir", target.parent, "--overwrite") if number == signal.SIGTERM else ("-o", target)
    sound = tmp_path / "o.wav"
    shutil.copy(media / "long.wav", sound)
    args = (media / "face.jpg", sound, *where, "--size", 512)
    running = started(warm, media, tmp_path / "tmp", *args, stderr=subprocess.PIPE)
    with running:
        said = b""
        while not re.search(rb"[ \r][1-9]\d*(/|frame)", said):  # the bar need not show the very first frame
            more = running.stderr.read1()
            assert more, said
            said += more
        assert len(list(target.parent.iterdir())) == 2, "the work in progress"
        running.send_signal(number)
        assert running.wait() == code
        assert b"Traceback" not in running.stderr.read()
    assert [path.name for path in target.parent.iterdir()] == ["o.mp4"]
    assert target.read_bytes() == b"an older video"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_who_listens_to_stderr_does_not_matter(warm: list[str], media: Path, tmp_path: Path) -> None:
    args = (media / "face.jpg", media / "short.wav", "-o", tmp_path / "o.mp4")
    running = started(warm, media, tmp_path / "tmp", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with running:
        running.stderr.read(30)
        running.stderr.close()
        assert running.stdout.read() == f"{tmp_path / 'o.mp4'}\n".encode()
    assert running.returncode == 0
    assert len(decoded(tmp_path / "o.mp4")) == FRAMES


def test_terminals_are_no_pipes(warm: list[str], media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pty = pytest.importorskip("pty")
    ends = pty.openpty()
    with os.fdopen(ends[1], "r+b", buffering=0) as terminal:
        for stream, reason in (("stdout", b"pipe the video"), ("stdin", b"pipe sound into it")):
            args = ("-", "-o", "-") if stream == "stdout" else ("-", "-o", media / "o.mp4")
            command = [*warm, "-m", "dheads", "sample", str(media / "face.jpg"), *map(str, args)]
            done = subprocess.run(command, **{stream: terminal}, stderr=subprocess.PIPE, check=False)
            assert done.returncode == 1
            assert done.stderr.startswith(b"error: ")
            assert done.stderr.count(b"\n") == 1
            assert reason in done.stderr
    os.close(ends[0])
