"""The state of a training run, which changes from step to step, and the file that it is saved in."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dheads.config import Config, from_dict, to_dict
from dheads.errors import DheadsError
from dheads.extensions.codes import CODES
from dheads.extensions.network import ExtendedUNet
from dheads.training.parts import load_parts, save_parts

# Keys whose values must be those of the weights that training starts from: they decide the shapes of the weights, or
# the meaning of the network's inputs and outputs.
_START = (
    "network.",
    "diffusion.",
    "conditioning.",
    "alignment.",
    "extensions.patches.",
    "extensions.copying.",
    "extensions.warp.flow",
    "extensions.motion.noise",
    "extensions.motion.hide_mouth",
    *(f"extensions.codes.{name}.context" for name, code in CODES.items() if not code.begins_at_zero),
)
# Exceptions: they leave the shapes as they are, or add layers that begin at zero.
_START_FREE = (
    "network.dropout",
    "extensions.patches.detail_channels",
    "conditioning.identity_frame",
    "alignment.smooth_frames",
)
# Weights with copy gates can be trained on to move the photo, whose gates are as many.
_START_WARP = ("extensions.copying.gates", "extensions.warp.flow")
# Raised for a damaged file.
_DAMAGE = (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError)
_CALM_STEPS = 100  # at the start of a run, where gradients have no usual size, so that none counts as exploding
_EXPLODED = 100.0  # times the running average of the gradient's norm
_NORM_DECAY = 0.99
_AHEAD = 32  # steps whose batches may already be prepared
_FILES = 9  # a state is divided into at most this many, unless they would be smaller than _FILE_BYTES
_FILE_BYTES = 15 * 2**20  # few mail servers and repositories accept larger files
_OLD_ROWS = {"eye": "eyes"}  # values of the log row under way that earlier versions named otherwise


class TrainingState:
    """The network, the average of its weights, the optimiser and all counts, which can be saved and resumed."""

    def __init__(self, unet: ExtendedUNet, config: Config, parts: int = 1) -> None:
        """parts: batches in a step, over all processes."""
        optimisation = config.optimisation
        self.unet, self.config, self.parts = unet, config, parts
        self.step = 0  # steps taken, including bad ones
        self.seconds = 0.0  # duration of the run, including validation and saving
        self.rollout_step: float = config.extensions.rollouts.start * optimisation.steps  # the first with roll-outs
        self.bad_steps = self.bad_in_a_row = 0
        self.usual_norm: float | None = None  # running average of the gradient's norm
        self.best = math.inf  # lowest validation loss
        self.row: dict[str, list[float]] = {}  # by name, sum and count of the values for the next log row
        device = next(unet.parameters()).device
        self.ema = ExtendedUNet(config).to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.ema.load_state_dict(unet.state_dict())
        # Without weight decay AdamW is the paper's Adam. Fused: one pass over all weights.
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay, fused=True
        )

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, 0 .. 1: of its steps or of its time, whichever is larger."""
        minutes = self.config.run.minutes
        by_time = 0.0 if minutes is None else self.seconds / (60 * minutes)
        return min(1.0, max(self.step / self.config.optimisation.steps, by_time))

    @property
    def is_done(self) -> bool:
        return self.progress >= 1

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to norm optimisation.grad_clip if it is larger; returns the norm before, ()."""
        parameters = list(self.unet.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.optimisation.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimisation.grad_clip, norm)
        return norm

    def advance(self, loss: float, norm: float, learning_rate: float, seconds: float = 0.0) -> str | None:
        """Take one step of the optimiser and of the average with the present gradient, whose norm is `norm`.

        seconds: duration of the step. Returns a message where the loss or the gradient is not finite, or the gradient
        exploded: such a step counts, but changes neither weights nor averages.
        """
        self.step += 1
        self.seconds += seconds
        if self.progress >= self.config.extensions.rollouts.start:
            self.rollout_step = min(self.rollout_step, self.step + _AHEAD)
        trouble, usual = None, self.usual_norm
        if not math.isfinite(loss + norm):
            trouble = f"step {self.step}: the loss or its gradient is not finite"
        elif usual is not None and self.step > _CALM_STEPS and norm > _EXPLODED * usual:
            trouble = f"step {self.step}: the gradient's norm is {norm:.3g}, but usually {usual:.3g}"
        if trouble is not None:
            self.bad_steps += 1
            self.bad_in_a_row += 1
            return trouble
        self.bad_in_a_row = 0
        self.usual_norm = norm if usual is None else _NORM_DECAY * usual + (1 - _NORM_DECAY) * norm
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        update_ema(self.ema, self.unet, self.step, self.config.optimisation.ema_decay)
        return None

    def note(self, name: str, total: float, count: float = 1) -> None:
        """Add `total`, the sum of `count` values of that name, to the next log row."""
        entry = self.row.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += count

    def finish_row(self) -> dict[str, float]:
        """The means for a log row, by name, without names that have no values; starts the next row."""
        means = {name: total / count for name, (total, count) in self.row.items() if count > 0}
        self.row = {}
        return means

    def save(self, path: Path) -> None:
        """Save the state, a large one in several files; the old state stays until the new one is complete.

        Raises DheadsError where a file cannot be written.
        """
        state: dict[str, Any] = {
            "config": json.dumps(to_dict(self.config)),
            "parts": self.parts,
            "step": self.step,
            "seconds": self.seconds,
            "rollout_step": self.rollout_step,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
            "usual_norm": self.usual_norm,
            "best": self.best,
            "row": self.row,
            "unet": self.unet.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        size = 4 * sum(tensor.nbytes for tensor in state["unet"].values())  # with the average and Adam's moments
        try:
            save_parts(path, state, self.step, max(_FILE_BYTES, size // (_FILES - 1)))
        except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's for a full disk
            raise DheadsError(f"cannot write the training state {path}: {error}") from error

    def resume(self, path: Path) -> None:
        """Continue from the state in `path`, if there is one.

        Raises DheadsError where it is damaged, or belongs to a run whose configuration differs in more than the
        sections run and preparation.
        """
        if not path.exists():
            return
        damaged = f"{path}: cannot be read; delete it to start again"
        try:
            state = load_parts(path)
            theirs = from_dict(json.loads(state["config"]))
        except (*_DAMAGE, DheadsError) as error:
            raise DheadsError(f"{damaged} ({error})") from error
        self._check(path, theirs, state.get("parts", theirs.run.accumulate))
        try:
            self.unet.load_state_dict(state["unet"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        except _DAMAGE as error:
            raise DheadsError(f"{damaged} ({error})") from error
        # Absent from states of earlier versions.
        self.seconds = state.get("seconds", 0.0)
        self.rollout_step = min(self.rollout_step, state.get("rollout_step", self.rollout_step))
        self.bad_steps, self.bad_in_a_row = state.get("bad_steps", 0), state.get("bad_in_a_row", 0)
        self.usual_norm, self.best = state.get("usual_norm"), state.get("best", math.inf)
        self.row = {_OLD_ROWS.get(name, name): entry for name, entry in state.get("row", {}).items()}

    def _check(self, path: Path, theirs: Config, parts: int) -> None:
        for key, (ours, other) in differences(self.config, theirs).items():
            # The section preparation does not change clips that are already prepared.
            if not key.startswith(("run.", "preparation.")):
                raise DheadsError(
                    f"{path}: belongs to a run with {key} = {other!r}, but now it is {ours!r}; choose another --out, "
                    "or that value"
                )
        if parts != self.parts:
            raise DheadsError(
                f"{path}: belongs to a run of {parts} batches a step, but now there are {self.parts}; choose "
                f"run.accumulate and the number of processes so that their product is {parts}"
            )


@torch.no_grad()
def update_ema(ema: ExtendedUNet, unet: ExtendedUNet, step: int, decay: float) -> None:
    """Update the average of a network's weights, in place; step: the number of steps taken."""
    # The decay is small at first, when old weights are far worse than new ones.
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)


def learning_rate(config: Config, step: int, progress: float) -> float:
    """The learning rate of that step, by optimisation.lr_schedule, after a linear warm-up.

    paper: times 0.8 every 1/18 of the run (section 4.1); cooldown: constant, then linear over the last 30 %.
    progress: the fraction of the run that is done, 0 .. 1.
    """
    optimisation = config.optimisation
    if optimisation.lr_schedule == "paper":
        factor = 0.8 ** math.floor(18 * progress)
    else:
        factor = min(1.0, max(0.02, (1 - progress) / 0.3))
    return optimisation.learning_rate * factor * min(1.0, (step + 1) / max(1, optimisation.warmup_steps))


def check_start(ours: Config, theirs: Config, name: str) -> None:
    """Raises DheadsError unless training by the configuration `ours` can start from weights of `theirs`.

    name: of the weights, for the message.
    """
    moves_photo = ours.extensions.warp.flow and theirs.extensions.copying.gates
    free = (*_START_FREE, *(_START_WARP if moves_photo else ()))
    for key, (value, other) in differences(ours, theirs).items():
        if key.startswith(_START) and key not in free:
            raise DheadsError(
                f"{name}: was trained with {key} = {other!r}, but the configuration has {value!r}; choose the preset "
                f"it was trained with, or set {key}"
            )


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, such as network.dropout, with both values where they differ; None: absent, like a code that is off."""
    mine, others = _flat(to_dict(ours)), _flat(to_dict(theirs))
    pairs = {key: (mine.get(key), others.get(key)) for key in mine | others}
    return {key: (value, other) for key, (value, other) in pairs.items() if value != other}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
