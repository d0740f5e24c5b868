"""Whether an hour of speech fills the memory: recordings in turns, as one long WAV file, read and encoded.

    python benchmarks/long_speech.py ../shared/samples/*.wav
    python benchmarks/long_speech.py ../shared/samples/*.wav --minutes 5 --video   # also made into a video

Prints the peak of this process's memory after the first minute of speech and after the last. --video: as `dheads
sample` does it, with random weights of the preset `tiny` in one step, which are as large in memory as trained ones.
"""

from __future__ import annotations

import resource  # not on Windows
import time
import wave
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from dheads.config import FPS, SAMPLE_RATE, preset
from dheads.extensions.network import ExtendedUNet
from dheads.media.sound import load_waveform, waveform_pieces
from dheads.media.writing import write_video
from dheads.sampling.talker import load
from dheads.speech.encoders import load_speech_encoder
from dheads.weights.checkpoints import save_checkpoint

FACE = Path(__file__).resolve().parents[1] / "examples" / "face.jpg"


def main(
    sounds: Annotated[list[Path], typer.Argument(help="Recordings, used in turns.")],
    minutes: float = 60,
    video: Annotated[bool, typer.Option("--video", help="Also make the video.")] = False,
    encoder: str = "whisper-tiny.en",
    device: str = "cpu",
) -> None:
    """Measure memory over a long recording."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_in_turns(folder / "long.wav", sounds, minutes)
        bar = tqdm(total=round(minutes * 60 * FPS), unit="frame", mininterval=5)
        start = time.perf_counter()
        if video:
            peaks = film(folder, device, bar)
        else:
            chunks = load_speech_encoder(encoder, device).encode_pieces(waveform_pieces(folder / "long.wav"))
            peaks = {}
            deque(watched((row for chunk in chunks for row in chunk), bar, peaks), maxlen=0)
    print(f"{'frames':<36} {bar.n}")
    print(f"{'seconds':<36} {time.perf_counter() - start:.0f}")
    print("\n".join(f"{when:<36} {mib:.0f}" for when, mib in peaks.items()))


def write_in_turns(path: Path, sounds: list[Path], minutes: float) -> None:
    left = round(minutes * 60 * SAMPLE_RATE)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        for waveform in cycle([load_waveform(sound) for sound in sounds]):
            file.writeframes((waveform[:left] * 32767).short().numpy().tobytes())
            left -= len(waveform)
            if left <= 0:
                return


def film(folder: Path, device: str, bar: tqdm) -> dict[str, float]:
    torch.manual_seed(0)
    tiny, weights, peaks = preset("tiny"), folder / "weights.safetensors", {}
    save_checkpoint(weights, ExtendedUNet(tiny).state_dict(), tiny, {})
    made = load(str(weights), device, progress=False).frames(FACE, folder / "long.wav", steps=1)
    write_video(folder / "long.mp4", watched(made, bar, peaks), folder / "long.wav")
    return peaks


def watched(items: Iterable[Any], bar: tqdm, peaks: dict[str, float]) -> Iterator[Any]:
    """The same items, one a video frame; notes the peak of memory."""
    for count, item in enumerate(items, 1):
        bar.update()
        if count == 60 * FPS:
            peaks["peak_mib_after_the_first_minute"] = peak_mib()
        yield item
    peaks["peak_mib_at_the_end"] = peak_mib()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    typer.run(main)
