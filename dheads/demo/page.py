"""The page: a photo and a recording in, the video out, with Gradio. Nothing on it comes from another address."""

from __future__ import annotations

import html
import os
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from threading import Event, Lock

import typer

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # neither its telemetry nor its check for new versions
import gradio as gr

import dheads
from dheads.errors import DheadsError
from dheads.sampling.jobs import MAX_MOTION
from dheads.sampling.talker import Talker
from dheads.system.signals import undoing

_EXAMPLE = [Path(dheads.__file__).parents[1] / "examples" / name for name in ("face.jpg", "speech.wav")]  # of a clone
_SIZES = [
    ("As the face in the photo", 0),
    *((f"{side} px", side) for side in (128, 256, 512, 768, 1024)),
]
_MAX_SEED = 2**53 - 1  # JavaScript's largest whole number
_MAX_FILE = "500mb"
_SWEPT_SECONDS, _KEPT_SECONDS = 3_600, 86_400  # how often files are looked through, and how old they grow
_MAX_WAITING = 20
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no Google Fonts
_CSS = "footer { display: none !important } .gradio-container { max-width: 1100px !important; margin: 0 auto }"
_HEAD = "# dheads\nA photo and a voice recording in, a video of that person saying it out."
_TERMS = (
    "Show only people who agreed to it. Videos are tagged as AI-generated in their metadata; say so wherever you show "
    "them. The packaged weights are for non-commercial research (CC BY-NC 4.0). What you upload is deleted after a day."
)


class _Stopped(Exception):
    """The user pressed Stop, or left the page."""


class Maker:
    """What the buttons of the page do."""

    def __init__(self, talker: Talker, folder: Path) -> None:
        """folder: for the videos."""
        self._talker, self._folder = talker, folder
        self.moves_heads = talker.unet.head_motion is not None
        # Gradio's queue starts the next job while a cancelled one still finishes its frame.
        self._one_at_a_time = Lock()
        self._stops: dict[str, Event] = {}  # of the latest job of each session, that is, of each open page

    def make(
        self,
        photo: str | None,
        sound: str | None,
        size: int,
        seed: float | None,
        motion: float | None,
        paste: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio finds it by this)
    ) -> str | None:
        """The video's path; None if stopped. Raises gr.Error, with DheadsError's sentence, for bad input."""
        if photo is None or sound is None:
            raise _error(f"there is no {'photo' if photo is None else 'sound'}; upload one")
        stopped = self._stops[request.session_hash] = Event()

        def on_frame(made: int, expected: int | None) -> None:
            if stopped.is_set():
                raise _Stopped
            progress((made, None if expected is None else max(made, expected)), desc="Generating", unit="frames")

        progress(0, desc="Finding the face")
        video = Path(mkdtemp(dir=self._folder)) / "dheads.mp4"
        try:
            with self._one_at_a_time:
                result = self._talker.sample(
                    photo, sound, video, size=None if paste else size or None, seed=int(seed or 0), paste=paste,
                    motion=motion if self.moves_heads else None, on_frame=on_frame,
                )  # fmt: skip
        except DheadsError as error:
            raise _error(_named(str(error), photo, sound)) from error
        except _Stopped:
            return None
        for note in result.notes:
            gr.Info(html.escape(_named(note, photo, sound)))
        return str(video)

    def stop(self, request: gr.Request) -> None:
        """End the work on the session's video after the current frame."""
        if stopped := self._stops.pop(request.session_hash, None):
            stopped.set()


def _error(sentence: str) -> gr.Error:
    return gr.Error(html.escape(sentence), duration=None, print_exception=False)


def _named(sentence: str, *paths: str) -> str:
    """The sentence with the files' own names, without the folders that they were uploaded to."""
    for path in paths:
        sentence = sentence.replace(path, Path(path).name)
    return sentence


def page(talker: Talker, folder: Path) -> gr.Blocks:
    """The page. folder: for the videos."""
    maker = Maker(talker, folder)
    with gr.Blocks(title="dheads", delete_cache=(_SWEPT_SECONDS, _KEPT_SECONDS)) as blocks:
        gr.Markdown(_HEAD)
        with gr.Row():
            with gr.Column():
                photo = gr.Image(
                    label="Photo", type="filepath", height=280, buttons=[],
                    webcam_options=gr.WebcamOptions(mirror=False),
                )  # fmt: skip
                # The file as it is: Gradio would convert it, and fail where Pillow alone cannot read it.
                photo.preprocess = lambda payload: payload.path if payload else None
                sound = gr.Audio(label="Sound", type="filepath", buttons=[])
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=100)
                    stop = gr.Button("Stop", min_width=100)
                with gr.Accordion("Options", open=False):
                    motion = gr.Slider(
                        0, MAX_MOTION, 1, step=0.1, label="Head motion; 0: still", visible=maker.moves_heads
                    )
                    paste = gr.Checkbox(label="Show the whole photo")
                    size = gr.Dropdown(_SIZES, value=0, label="Size of the video")
                    seed = gr.Number(0, label="Seed; another one gives another performance", precision=0, minimum=0,
                                     maximum=_MAX_SEED)  # fmt: skip
            with gr.Column():
                video = gr.Video(label="Video", interactive=False, height=400, buttons=["download"])
                gr.Markdown(_TERMS)
                if all(path.is_file() for path in _EXAMPLE):
                    gr.Examples([[str(path) for path in _EXAMPLE]], [photo, sound], cache_examples=False)
        making = start.click(
            maker.make, [photo, sound, size, seed, motion, paste], video, concurrency_limit=1, scroll_to_output=True
        )
        stop.click(maker.stop, cancels=making, queue=False)
        blocks.unload(maker.stop)
        paste.change(lambda whole: gr.update(interactive=not whole), paste, size, queue=False)
    return blocks.queue(max_size=_MAX_WAITING)


def serve(talker: Talker, host: str, port: int) -> None:
    """Serve the page until the program is ended. Raises DheadsError where the address cannot be used."""
    with TemporaryDirectory(prefix="dheads-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads
        os.environ["no_proxy"] = "*"  # Gradio asks its own server whether it answers, which no proxy can reach
        with undoing(partial(shutil.rmtree, folder, ignore_errors=True)):
            blocks = page(talker, Path(folder))
            try:
                _, address, _ = blocks.launch(
                    server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                    ssr_mode=False, mcp_server=False, pwa=False, run_history=False, enable_monitoring=False,
                    footer_links=[], max_file_size=_MAX_FILE, theme=gr.themes.Default(**_FONTS), css=_CSS,
                )  # fmt: skip
            except OSError as error:
                raise DheadsError(f"cannot listen on port {port} of {host}; choose another --port or --host") from error
            typer.echo(address)
            blocks.block_thread()
