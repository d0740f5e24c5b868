"""All that changes from step to step in training, and the files that keep it."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dheads.config import Config, from_dict, to_dict
from dheads.errors import DheadsError
from dheads.extensions.codes import CODES
from dheads.extensions.network import ExtendedUNet
from dheads.system.files import complete_or_absent
from dheads.training.parts import load_parts, save_parts

# What weights to start from must have in common: it decides about their shapes, or what they have learnt to read.
_START = (
    "network.",
    "diffusion.",
    "conditioning.",
    "alignment.",
    "extensions.patches.",
    "extensions.copying.",
    "extensions.motion.noise",
    "extensions.motion.hide_mouth",
    *(f"extensions.codes.{name}.context" for name, code in CODES.items() if not code.begins_at_zero),
)
# But these leave the shapes as they are, or add what begins at zero.
_START_FREE = ("network.dropout", "extensions.patches.detail_channels", "conditioning.identity_frame")
# What reading a damaged file raises.
_DAMAGE = (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError)
_CALM_STEPS = 100  # after which a gradient can explode: the first ones have no usual size
_EXPLODED = 100.0  # times the running average of the gradient's norm
_NORM_DECAY = 0.99
_AHEAD = 32  # steps whose batches may be in the making
_FILES = 8  # of a state, or so many more that none is larger than it need be
_FILE_BYTES = 15 * 2**20  # what mail, chats and repositories let through


class TrainingState:
    """The network, its average, its optimiser and the counts, so that they can be saved and resumed."""

    def __init__(self, unet: ExtendedUNet, config: Config, parts: int = 1) -> None:
        """parts: batches a step, over all processes."""
        optimisation = config.optimisation
        self.unet, self.config, self.parts = unet, config, parts
        self.step = 0  # steps taken, bad ones too
        self.seconds = 0.0  # what they took, with all that is done beside them
        self.rollout_step: float = config.extensions.rollouts.start * optimisation.steps  # the first one with roll-outs
        self.bad_steps = self.bad_in_a_row = 0
        self.usual_norm: float | None = None  # running average of the gradient's norm
        self.best = math.inf  # lowest validation loss
        self.row: dict[str, list[float]] = {}  # sum and count of every value of the log row under way
        device = next(unet.parameters()).device
        self.ema = ExtendedUNet(config).to(device).eval().requires_grad_(False)
        self.ema.to(memory_format=torch.channels_last)
        self.ema.load_state_dict(unet.state_dict())
        # With no weight decay AdamW is the paper's Adam. Fused: one pass over all weights.
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay, fused=True
        )

    @property
    def progress(self) -> float:
        """How far the run is, 0 .. 1: by its steps, or by its time where that is farther."""
        minutes = self.config.run.minutes
        by_time = 0.0 if minutes is None else self.seconds / (60 * minutes)
        return min(1.0, max(self.step / self.config.optimisation.steps, by_time))

    @property
    def is_done(self) -> bool:
        return self.progress >= 1

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down where it is longer than optimisation.grad_clip; returns its norm before that, ()."""
        parameters = list(self.unet.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.optimisation.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimisation.grad_clip, norm)
        return norm

    def advance(self, loss: float, norm: float, learning_rate: float, seconds: float = 0.0) -> str | None:
        """One step of the optimiser and of the average, by the gradient of that norm; it took so many seconds.

        Returns what is wrong where the loss or the gradient is not finite, or the gradient exploded: then the step
        counts, but changes neither weights nor averages.
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
        """Add the sum of `count` values of that name to the log row under way."""
        entry = self.row.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += count

    def finish_row(self) -> dict[str, float]:
        """The means of the log row under way, of what there was any of; the next row begins."""
        means = {name: total / count for name, (total, count) in self.row.items() if count > 0}
        self.row = {}
        return means

    def save(self, path: Path) -> None:
        """Write everything, a large state into several files; it changes only when the new one is complete.

        Raises DheadsError where it cannot.
        """
        state = {
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
        except (OSError, RuntimeError) as error:  # RuntimeError: a full disk, in PyTorch's words
            raise DheadsError(f"cannot write the training state {path}: {error}") from error

    def resume(self, path: Path) -> bool:
        """Go on from `path`; False where there is none.

        Raises DheadsError when it is damaged, or of a run that differs in more than how often it writes what.
        """
        if not path.exists():
            return False
        damaged = f"{path}: cannot be read; delete it to start anew"
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
        # Absent from older states.
        self.seconds = state.get("seconds", 0.0)
        self.rollout_step = min(self.rollout_step, state.get("rollout_step", self.rollout_step))
        self.bad_steps, self.bad_in_a_row = state.get("bad_steps", 0), state.get("bad_in_a_row", 0)
        self.usual_norm, self.best = state.get("usual_norm"), state.get("best", math.inf)
        self.row = state.get("row", {})
        return True

    def _check(self, path: Path, theirs: Config, parts: int) -> None:
        for key, (ours, other) in differences(self.config, theirs).items():
            # The clips are as they are, however others would be prepared.
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
    """Move the average of a network's weights, in place; step: how long it has been trained for."""
    # A short memory at first: the average of a young network is worse than the network.
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)


def learning_rate(config: Config, step: int, progress: float) -> float:
    """The paper's x 0.8 every 1/18 of the run (section 4.1), or constant with a linear end; after a warm-up.

    progress: how far the run is, 0 .. 1.
    """
    optimisation = config.optimisation
    if optimisation.lr_schedule == "paper":
        factor = 0.8 ** math.floor(18 * progress)
    else:
        factor = min(1.0, max(0.02, (1 - progress) / 0.3))
    return optimisation.learning_rate * factor * min(1.0, (step + 1) / max(1, optimisation.warmup_steps))


def check_start(ours: Config, theirs: Config, name: str) -> None:
    """Raises DheadsError unless weights of the configuration `theirs` can be trained on by that of `ours`."""
    for key, (value, other) in differences(ours, theirs).items():
        if key.startswith(_START) and key not in _START_FREE:
            raise DheadsError(
                f"{name}: was trained with {key} = {other!r}, but the configuration has {value!r}; choose the preset "
                f"it was trained with, or set {key}"
            )


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, such as network.dropout, whose values differ, with both; None: absent, as of a code that is off."""
    mine, others = _flat(to_dict(ours)), _flat(to_dict(theirs))
    pairs = {key: (mine.get(key), others.get(key)) for key in mine | others}
    return {key: (value, other) for key, (value, other) in pairs.items() if value != other}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- Files of weights

_NUMBERED = re.compile(r"weights-(\d{7,})\.safetensors")


def numbered(run: Path, step: int) -> Path:
    """The weights of that step."""
    return run / f"weights-{step:07d}.safetensors"


def publish(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`, in one stroke. Raises DheadsError where it cannot be."""
    try:
        with complete_or_absent(target) as part:
            try:
                os.link(source, part)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, part)
    except OSError as error:
        raise DheadsError(f"cannot write {target}: {error.strerror}") from error


def prune(run: Path, step: int, keep: int) -> None:
    """Remove numbered weights but the last `keep` up to `step`; later ones are of an earlier run in this folder."""
    found = {int(match[1]): path for path in run.iterdir() if (match := _NUMBERED.fullmatch(path.name))}
    kept = sorted(number for number in found if number <= step)[-keep:] if keep > 0 else []
    for number, path in found.items():
        if number not in kept:
            path.unlink(missing_ok=True)
