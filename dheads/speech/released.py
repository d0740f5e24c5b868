"""The authors' speech encoder, a TorchScript file that is downloaded once its licence is accepted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from dheads.media.sound import SAMPLES_PER_FRAME
from dheads.speech.interface import SpeechEncoder, stretches
from dheads.weights.fetching import fetch
from dheads.weights.torchscript import load_script


def load_released(device: torch.device, progress: bool) -> ReleasedEncoder:
    """The authors' encoder. Raises DheadsError as `fetch` and `load_script` do."""
    # Loaded onto the device, because `to` does not move the tensors inside its code.
    return ReleasedEncoder(load_script(fetch("diffused-heads", progress), device))


class ReleasedEncoder(SpeechEncoder):
    """The authors' encoder: a recurrent network that gets the 0.2 s around each frame in turn."""

    name = "diffused-heads"
    dim = 256
    window = 3_200  # samples: the 640 of a frame, and 1280 before and after
    chunk = 25  # frames given at once
    hidden: Tensor

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script
        self.register_buffer("hidden", torch.zeros(2, 1, 256), persistent=False)  # the initial state

    @torch.inference_mode()
    def encode_pieces(self, pieces: Iterable[Tensor], frames: int | None = None) -> Iterator[Tensor]:
        before = (self.window - SAMPLES_PER_FRAME) // 2
        lengths = torch.tensor([self.window])  # on the CPU, as packing sequences demands
        hidden = self.hidden
        for sound, _, _ in stretches(pieces, frames, self.window, before, self.chunk):
            embeddings = []
            for window in sound.to(self.hidden).unfold(0, self.window, SAMPLES_PER_FRAME):
                embedding, _, hidden = self.script(window[None, None], lengths, init_state=hidden)
                embeddings.append(embedding.flatten())
            yield torch.stack(embeddings)  # (f, 256)
