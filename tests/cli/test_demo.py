"""`python -m dheads.demo`: what its buttons do, and the page itself in a browser."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from browser import Browser
from conftest import ROOT
from PIL import Image
from real_data import decoded, sound_seconds, write_wav
from test_sample import TINY, untrained

from dheads.errors import DheadsError
from dheads.media.sound import load_waveform
from dheads.sampling.talker import Talker, load
from dheads.weights.checkpoints import save_checkpoint

pytest_plugins = ("browser", "real_data")

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the extra demo is not installed")
MODULE = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_module('dheads.demo', run_name='__main__')"
FRAMES, SAMPLES = 15, 9_600
# The first of what an expression finds in the page, as soon as there is something.
FOUND = """new Promise(done => {
    const look = () => { const found = EXPRESSION; found ? done(found) : requestAnimationFrame(look); };
    look();
})"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "tiny.safetensors"
    save_checkpoint(path, untrained(TINY).state_dict(), TINY, {})
    return path


@pytest.fixture(scope="module")
def talker(weights: Path) -> Talker:
    return load(str(weights), "cpu", progress=False)


class Stub:
    """A talker that makes four frames of nothing."""

    unet = SimpleNamespace(head_motion=True)

    def __init__(self, before_frame: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.before_frame = before_frame

    def sample(
        self, photo: str, sound: str, video: Path, *, on_frame: Callable[[int, int], object], **options: Any
    ) -> Any:
        self.calls.append((photo, sound, options))
        for made in range(1, 5):
            self.before_frame()
            on_frame(made, 4)
        video.touch()
        return SimpleNamespace(notes=[])


def session() -> Any:
    import gradio

    return gradio.Request(session_hash="one")


def test_without_gradio_one_sentence_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", MODULE], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the demo needs the package gradio: pip install 'dheads[demo]'\n"


@needs_gradio
def test_the_button_passes_its_options_on_and_counts_frames(tmp_path: Path) -> None:
    from dheads.demo.page import Maker

    stub, seen = Stub(), []
    progress = lambda value, **text: seen.append(value)  # noqa: E731
    video = Maker(stub, tmp_path).make("a.jpg", "b.wav", 0, 3.0, 0.5, True, session(), progress)
    assert video is not None
    assert Path(video).is_relative_to(tmp_path)
    options = {"size": None, "seed": 3, "motion": 0.5, "paste": True}
    assert stub.calls == [("a.jpg", "b.wav", options)]
    assert seen == [0, (1, 4), (2, 4), (3, 4), (4, 4)]


@needs_gradio
@pytest.mark.parametrize(("paste", "passed"), [(False, 512), (True, None)])
def test_a_size_that_was_chosen_does_not_count_for_a_whole_photo(
    tmp_path: Path, paste: bool, passed: int | None
) -> None:
    from dheads.demo.page import Maker

    stub = Stub()
    Maker(stub, tmp_path).make("a.jpg", "b.wav", 512, 0, 1.0, paste, session(), lambda value, **text: None)
    ((_, _, options),) = stub.calls
    assert (options["size"], options["paste"]) == (passed, paste)


@needs_gradio
def test_stop_ends_the_work_of_its_own_page(tmp_path: Path) -> None:
    import gradio

    from dheads.demo.page import Maker

    made = []

    def press() -> None:
        made.append(1)
        maker.stop(gradio.Request(session_hash="another"))
        if len(made) == 2:
            maker.stop(session())

    maker = Maker(Stub(press), tmp_path)
    assert maker.make("a.jpg", "b.wav", 0, 0, 1, False, session()) is None
    assert len(made) == 2
    maker = Maker(Stub(), tmp_path)
    maker.stop(session())  # of no use to the next video
    assert maker.make("a.jpg", "b.wav", 0, 0, 1, False, session())


@needs_gradio
@pytest.mark.parametrize(
    ("photo", "sound", "sentence"),
    [
        (None, "speech.wav", "there is no photo; upload one"),
        ("face.jpg", None, "there is no sound; upload one"),
        ("empty <i>.png", "speech.wav", "empty &lt;i&gt;.png: no face found"),
        ("damaged.jpg", "speech.wav", "damaged.jpg: the photo is damaged"),
        ("face.jpg", "damaged.jpg", "damaged.jpg holds no sound stream"),
        ("face.jpg", "nothing.wav", "nothing.wav is not a sound or video file"),
    ],
)
def test_bad_input_is_the_tools_own_sentence(
    talker: Talker, examples: Path, tmp_path: Path, photo: str | None, sound: str | None, sentence: str
) -> None:
    import gradio

    from dheads.demo.page import Maker

    Image.new("RGB", (200, 200), "gray").save(tmp_path / "empty <i>.png")
    (tmp_path / "damaged.jpg").write_bytes((examples / "face.jpg").read_bytes()[:20])
    (tmp_path / "nothing.wav").touch()
    for name in ("face.jpg", "speech.wav"):
        (tmp_path / name).symlink_to(examples / name)
    photo, sound = (name and str(tmp_path / name) for name in (photo, sound))
    with pytest.raises(gradio.Error) as caught:
        Maker(talker, tmp_path).make(photo, sound, 0, 0, 1, False, session())
    assert caught.value.message.startswith(sentence)
    assert str(tmp_path) not in caught.value.message
    assert not list(tmp_path.glob("*/*.mp4"))


@needs_gradio
def test_a_port_in_use_is_one_sentence() -> None:
    from dheads.demo.page import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DheadsError, match=f"cannot listen on port {port} of 127.0.0.1"):
            serve(Stub(), "127.0.0.1", port)


@pytest.fixture
def address(weights: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the page, served by the command itself; its temporary files are in temporary/."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "dheads.demo", "--port", str(port), "--weights", str(weights), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as server:
        yield server.stdout.readline().strip()
        server.terminate()
        assert server.wait(20) == 143


@needs_gradio
def test_a_video_is_made_in_the_browser(browser: Browser, address: str, examples: Path, tmp_path: Path) -> None:
    (tmp_path / "person.jpg").write_bytes((examples / "face.jpg").read_bytes())
    write_wav(tmp_path / "hello.wav", load_waveform(examples / "speech.wav")[8_000:][:SAMPLES])
    browser.screen(1280)
    browser.open(address)
    uploads = [("image", "person.jpg", "img[src*='person.jpg']"), ("audio", "hello.wav", "#waveform")]
    for kind, name, shown in uploads:
        browser.run(found(f"document.querySelector('input[type=file][accept^={kind}]')"))
        browser.upload(f"input[type=file][accept^={kind}]", tmp_path / name)
        browser.run(found(f'document.querySelector("{shown}")'))
    browser.run("[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Generate').click()")
    video = browser.run(found("document.querySelector('video[src*=\".mp4\"]')?.src"))
    with urlopen(video) as answer:
        (tmp_path / "video.mp4").write_bytes(answer.read())
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
    assert len(decoded(tmp_path / "video.mp4")) == FRAMES
    assert sound_seconds(tmp_path / "video.mp4") == pytest.approx(SAMPLES / 16_000, abs=0.05)
    assert {url.split("/")[2] for url in browser.requests if url.startswith("http")} == {address.split("/")[2]}
    assert not [url for url in browser.requests if not url.startswith(("http", "data:", "blob:"))]


def found(expression: str) -> str:
    return FOUND.replace("EXPRESSION", expression)
