"""What the main process writes in the run folder during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dheads.config import FPS, override, to_toml
from dheads.dataset.choice import choose_evenly
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import clip_path
from dheads.denoiser import Denoiser
from dheads.errors import DheadsError
from dheads.media.sound import SAMPLES_PER_FRAME, load_waveform, wav_file
from dheads.media.writing import write_video
from dheads.sampling.engine import Engine
from dheads.sampling.talker import generate
from dheads.system.files import complete_or_absent
from dheads.training.batches import Batches
from dheads.training.journal import Journal
from dheads.training.objective import training_loss, weighted_codes
from dheads.training.state import TrainingState
from dheads.training.weight_files import numbered, prune, publish
from dheads.weights.checkpoints import save_checkpoint

_VALIDATION_STEP = 2**40  # beyond any training step: its examples are never trained on
_VALIDATION_EXAMPLES = 64
# Alterations of training examples that validation leaves out.
_CLEAN = {
    "motion": {"drift": 0.0, "holes": 0.0, "start_share": 0.0},
    "sound": {"dropout": 0.0},
    "rollouts": {"share": 0.0},
    "examples": {"augment": False, "other_clip_share": 0.0},
}
_SAMPLE_FRAMES = 3 * FPS


class Records:
    """Validation, metrics, weights, states and sample videos of a run.

    Failures, such as a full disk or a clip that cannot be read, are recorded as events and do not end the run.
    """

    def __init__(self, run: Path, dataset: Dataset, state: TrainingState, precision: str) -> None:
        """precision: that of the network in validation, "fp32" or "bf16"."""
        config = state.config
        self._run, self._dataset, self._state = run, dataset, state
        self._denoiser = Denoiser(state.ema, precision)
        self._held_out = dataset.split("val")
        codes = {name: {"noise": 0.0, "event_share": 0.0} for name in config.extensions.codes}
        self._clean = override(config, {"extensions": _CLEAN | {"codes": codes}})
        self._batches = Batches(dataset, self._held_out, self._clean) if self._held_out else None
        self._broken: dict[str, str] = {}
        self.journal = Journal(run, state.step)
        with self._recording("config.toml is not written"), complete_or_absent(run / "config.toml") as part:
            part.write_text(to_toml(config), encoding="utf-8")

    def close(self) -> None:
        self.journal.close()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses on held-out speakers by name; examples, timesteps and noise are the same every time."""
        if self._batches is None:
            return {}
        batches = -(-_VALIDATION_EXAMPLES // self._clean.optimisation.batch_size)
        with self._recording("validation failed"):
            rows = [
                training_loss(self._denoiser, self._batches.batch(step, 0), self._clean, step)
                for step in range(_VALIDATION_STEP, _VALIDATION_STEP + batches)
            ]
            names = ("loss", "simple", "lip", *weighted_codes(self._clean))
            return {f"val_{name}": float(torch.stack([row[name] for row in rows]).mean()) for name in names}
        return {}

    def log(self, row: dict[str, float], broken: dict[str, str]) -> None:
        """Write one row of metrics; broken: training clips that could not be read so far, and why."""
        broken = broken | (self._batches.broken if self._batches else {})
        if new := {clip: broken[clip] for clip in sorted(broken.keys() - self._broken.keys())}:
            message = f"{len(new)} clips cannot be read and are replaced by others: {' | '.join(new.values())}"
            self.journal.event(self._state.step, "broken_clips", message, clips=new)
            self._broken |= new
        counts = {"broken_clips": len(broken), "bad_steps": self._state.bad_steps}
        self.journal.log(self._state.step, row | counts)

    def save_weights(self, val_loss: float | None, last: bool) -> None:
        """Save the averaged weights by number, as the newest, and as the best where `val_loss` is the lowest so far.

        last: whether the run ends here, in which case a failure is raised.
        """
        run, state = self._run, self._state
        optimisation = state.config.optimisation
        summary = {
            "steps": state.step,
            "examples": state.step * optimisation.batch_size * state.parts,
            "clips": len(self._dataset.split("train")),
        }
        info = {"training": summary, "license": self._dataset.info.get("licence_note")}
        with self._recording("the weights are not saved", fatal=last):
            # Half the size, and still more digits than the bf16 that the network computes in.
            dtype = torch.float16 if optimisation.precision == "bf16" else torch.float32
            save_checkpoint(numbered(run, state.step), state.ema.state_dict(), state.config, info, dtype)
            publish(numbered(run, state.step), run / "weights.safetensors")
            if val_loss is not None and val_loss < state.best:
                publish(numbered(run, state.step), run / "best.safetensors")
                state.best = val_loss
            prune(run, state.step, state.config.run.keep)

    def save_state(self) -> None:
        """Save the training state, from which the run can be resumed."""
        with self._recording("the training state is not saved"):
            self._state.save(self._run / "state.pt")

    def save_samples(self) -> None:
        """Write sample videos of some held-out clips, generated from first frame and sound, next to the true frames."""
        config, folder = self._state.config, self._run / "samples"
        for clip in choose_evenly(self._held_out or self._dataset.split("train"), config.run.sample_clips):
            with self._recording(f"no sample video of {clip.clip}"):
                folder.mkdir(exist_ok=True)
                truth = self._dataset.frames(clip)[:_SAMPLE_FRAMES]
                speech = self._dataset.labels(clip)["speech"][: len(truth)]
                generated = generate(Engine(self._state.ema), self._dataset.photo(clip, config), speech)
                pairs = (np.concatenate(pair, axis=1) for pair in zip(generated, truth, strict=True))
                waveform = load_waveform(clip_path(self._dataset.root, clip.clip, "mp4"))
                sound = wav_file(waveform[: len(truth) * SAMPLES_PER_FRAME])
                write_video(folder / f"{self._state.step:07d}-{clip.clip.replace('/', '-')}.mp4", pairs, sound)

    @contextmanager
    def _recording(self, failure: str, fatal: bool = False) -> Iterator[None]:
        """A block whose errors become events; failure: how the message begins; fatal: errors are raised instead."""
        try:
            yield
        except (DheadsError, OSError, torch.OutOfMemoryError) as error:
            if fatal:
                raise
            self.journal.event(self._state.step, "failed", f"step {self._state.step}: {failure}: {error}")
