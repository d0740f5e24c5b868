"""Self-supervised speech models of torchaudio, HuBERT and wav2vec 2.0, downloaded by torchaudio."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator

import torch
import torchaudio
from torch import Tensor
from torchaudio.models import Wav2Vec2Model

from dheads.errors import DheadsError
from dheads.media.sound import SAMPLES_PER_FRAME
from dheads.speech.interface import SpeechEncoder, stretches
from dheads.weights.listing import home

BUNDLES = {"hubert-base": torchaudio.pipelines.HUBERT_BASE, "wav2vec2-base": torchaudio.pipelines.WAV2VEC2_BASE}


def load_bundle(name: str, progress: bool) -> BundleEncoder:
    """The encoder of that name in BUNDLES. Raises DheadsError where it cannot be downloaded or read."""
    # `weights_only`: torchaudio checks no hash of its files, so nothing but tensors may be unpickled.
    options = {"model_dir": str(home()), "progress": progress, "weights_only": True}
    try:
        model = BUNDLES[name].get_model(dl_kwargs=options)
    # What torch raises offline, and for files that are cut off or of another kind.
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise DheadsError(
            f"cannot download or read the speech encoder {name!r} ({(str(error) or repr(error)).splitlines()[0]}); "
            f"put the file of that name in weights.toml into {home()}, or delete the one there if it is damaged"
        ) from error
    return BundleEncoder(name, model)


class BundleEncoder(SpeechEncoder):
    """The output of one transformer block of a self-supervised model, averaged over the two positions of each frame."""

    dim = 768
    layer = 6  # of 12: the middle ones encode speech best, the last ones the model's own training task
    chunk = 250  # frames encoded at once, with `margin` more on either side as context
    margin = 50

    def __init__(self, name: str, model: Wav2Vec2Model) -> None:
        super().__init__()
        self.name = name
        self.model = model

    @torch.inference_mode()
    def encode_pieces(self, pieces: Iterable[Tensor], frames: int | None = None) -> Iterator[Tensor]:
        # Output j sees samples 320 j to 320 j + 400. The middle of outputs 2 k and 2 k + 1, sample 640 k + 360,
        # coincides with the middle of the frame, sample 640 k + 320, as windows begin 40 samples ahead of it.
        before, window = 40, SAMPLES_PER_FRAME + 80
        like = next(self.model.parameters())
        for sound, skipped, count in stretches(pieces, frames, window, before, self.chunk, self.margin):
            x = self.model.extract_features(sound.to(like)[None], num_layers=self.layer)[0][-1][0]  # (2 frames, D)
            yield x.unflatten(0, (-1, 2)).mean(dim=1)[skipped : skipped + count]
