"""`dheads train`: a prepared dataset to weights."""

from __future__ import annotations

import json
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dheads import losses
from dheads.augment import drift
from dheads.conditioning import Condition, build
from dheads.config import FPS, Config, to_dict
from dheads.data import Batch, Clip, Dataset, draw_batch
from dheads.denoiser import Denoiser
from dheads.diffusion import q_sample, v_target
from dheads.errors import DheadsError
from dheads.model import UNet
from dheads.sample import generate
from dheads.video import write_video
from dheads.weights import load_checkpoint, save_checkpoint

_VALIDATION_BATCHES = 4
_SAMPLE_FRAMES = 3 * FPS


def train(
    config: Config,
    data: Path,
    run: Path,
    *,
    device: str = "cpu",
    init: Path | None = None,
    progress: bool = True,
) -> Path:
    """Train on a prepared dataset; returns the path of the EMA weights, `run`/weights.safetensors.

    `run` also gets config.json, metrics.jsonl, sample videos, and state.pt, from which a killed run goes on exactly
    where it was. `init`: a checkpoint whose weights to start from.

    Raises DheadsError when the data does not fit the configuration, or `run` holds another configuration's state.
    """
    # Data and folder.
    dataset = Dataset(data)
    dataset.check(config)
    clips, held_out = dataset.split("train"), dataset.split("val")
    if not clips:
        raise DheadsError(f"{data}: has no clip in its train split; check clips.csv or the splits given to prepare")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DheadsError(f"cannot make the folder {run}: {error.strerror}; choose another --out") from error

    # Network, its average, optimiser.
    torch.manual_seed(config.training.seed)
    unet = UNet(config)
    if init is not None:
        _start_from(unet, init)
    if unet.lips is not None:
        talks = dataset.talks("train")
        if not talks:
            raise DheadsError(
                f"{data}: has no video to train on, which the lip code needs; set conditioning.lip_dims=0"
            )
        unet.lips.fit(talks)
    unet = unet.to(device, memory_format=torch.channels_last)
    state = TrainingState(unet, config)
    state.resume(run / "state.pt")
    (run / "config.json").write_text(json.dumps(to_dict(config), indent=2), encoding="utf-8")
    denoiser = Denoiser(unet, config.training.precision)
    averaged = Denoiser(state.ema, config.training.precision)

    # Steps.
    steps = config.training.steps
    recent: list[dict[str, float]] = []
    bar = tqdm(total=steps, initial=state.step, desc="train", unit="step", disable=not progress)
    # The next batch is made beside the step, by one thread: its small operations gain nothing from more.
    with bar, ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as loader:
        upcoming = loader.submit(draw_batch, dataset, clips, config, state.step)
        while state.step < steps:
            batch = upcoming.result()
            upcoming = loader.submit(draw_batch, dataset, clips, config, state.step + 1)
            unet.train()
            terms = training_loss(denoiser, batch, config, state.step)
            try:
                grad_norm = state.update(terms["loss"].mean(), learning_rate(config, state.step))
            except FloatingPointError as error:
                raise DheadsError(
                    f"{run}: {error} at step {state.step} (clips {', '.join(batch.clips)}); "
                    "lower training.learning_rate and train into another folder"
                ) from error
            recent.append(
                {name: float(value.detach().mean()) for name, value in terms.items()} | {"grad_norm": grad_norm}
            )
            bar.update()
            if _due(state.step, config.training.log_every, steps):
                metrics = {name: float(np.mean([row[name] for row in recent])) for name in recent[0]}
                if held_out:
                    metrics |= validate(averaged, dataset, held_out, config)
                bar.set_postfix(loss=f"{metrics['loss']:.4f}")
                _append(run / "metrics.jsonl", {"step": state.step, "lr": learning_rate(config, state.step), **metrics})
                recent.clear()
            if _due(state.step, config.training.checkpoint_every, steps):
                state.save(run / "state.pt")
                _save_weights(run / "weights.safetensors", state, dataset)
            if _due(state.step, config.training.sample_every, steps):
                _sample_video(run / f"sample-{state.step:07d}.mp4", averaged, dataset, held_out or clips, config)
    return run / "weights.safetensors"


def _start_from(unet: UNet, path: Path) -> None:
    try:
        unet.load_state_dict(load_checkpoint(path).tensors)
    except RuntimeError as error:
        raise DheadsError(f"{path}: its weights are of another network than the configuration's") from error


class TrainingState:
    """All that changes from step to step, so that it can be saved and resumed."""

    def __init__(self, unet: UNet, config: Config) -> None:
        training = config.training
        self.unet, self.step, self._training = unet, 0, training
        self.ema = UNet(config).to(next(unet.parameters()).device).eval().requires_grad_(False)
        self.ema.load_state_dict(unet.state_dict())
        # With no weight decay AdamW is the paper's Adam.
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )

    def update(self, loss: Tensor, learning_rate: float) -> float:
        """One optimiser step and one step of the average; returns the gradient's norm before clipping.

        Raises FloatingPointError, with nothing changed, when the loss or its gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self._training.grad_clip)
        if not torch.isfinite(loss.detach() + norm):
            raise FloatingPointError("the loss or its gradient is not finite")
        self.optimizer.step()
        self.step += 1
        # A short memory at first: the average of a young network is worse than the network.
        decay = min(self._training.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), 1 - decay)
        return float(norm)

    def save(self, path: Path) -> None:
        state = {
            "config": json.dumps(to_dict(self.unet.config)),
            "step": self.step,
            "unet": self.unet.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_name(f".{path.name}.part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path: Path) -> None:
        """Go on from `path` where it exists. Raises DheadsError when it belongs to another network or is damaged."""
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            config = json.loads(state["config"])
            if config != json.loads(json.dumps(to_dict(self.unet.config))):
                raise DheadsError(
                    f"{path}: belongs to another configuration; choose another --out or that configuration"
                )
            self.unet.load_state_dict(state["unet"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        except (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise DheadsError(f"{path}: cannot be read; delete it to start anew ({error})") from error


def learning_rate(config: Config, step: int) -> float:
    """The paper's x 0.8 every 1/18 of the steps (section 4.1), or constant with a linear end; after a warm-up."""
    training = config.training
    share = step / training.steps
    if training.lr_schedule == "paper":
        factor = 0.8 ** math.floor(18 * share)
    else:
        factor = min(1.0, max(0.02, (1 - share) / 0.3))
    return training.learning_rate * factor * min(1.0, (step + 1) / max(1, training.warmup_steps))


def training_loss(denoiser: Denoiser, batch: Batch, config: Config, step: int) -> dict[str, Tensor]:
    """The loss and its terms for each example, (B,): L = L_simple + lambda_vlb L_vlb + lambda_ls L_ls (paper eq. 9).

    All randomness comes from the seed and the step.
    """
    training, schedule = config.training, denoiser.schedule
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
    device = next(denoiser.unet.parameters()).device
    x_0 = batch.target.to(device)
    t = torch.randint(schedule.num_steps, (len(x_0),), generator=generator).to(device)
    eps = torch.randn(x_0.shape, generator=generator).to(device)
    condition = training_condition(denoiser.unet, batch, config, generator)
    # Dropout draws from the global generator.
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
    x_t = q_sample(schedule, x_0, t, eps)
    denoised, output = denoiser(x_t, t, condition)
    if training.snr_clip is None:
        # The paper: squared errors of the network's output.
        targets = {"eps": eps, "v": v_target(schedule, x_0, eps, t), "x_0": x_0}
        error = (output.prediction - targets[config.diffusion.prediction]).square()
    else:
        weight = losses.snr_weight(schedule, t, training.snr_clip)[:, None, None, None]
        error = weight * (denoised.x_0 - x_0).square()
    simple = error.flatten(1).mean(1)
    lip = losses.lip(error, batch.mouth_box.to(device))
    vlb = torch.zeros_like(simple)
    if denoised.var_frac is not None:
        vlb = losses.vlb(schedule, x_0, x_t, t, denoised.x_0, denoised.var_frac)
    loss = losses.total(simple, vlb, lip, training.lambda_vlb, training.lambda_lip)
    return {"loss": loss, "simple": simple, "vlb": vlb, "lip": lip}


def training_condition(unet: UNet, batch: Batch, config: Config, generator: torch.Generator) -> Condition:
    """Conditioning with what training alone does: noise on motion frames and lip codes, sound taken away at times."""
    told, training = config.conditioning, config.training
    device = next(unet.parameters()).device
    count = len(batch.target)
    motion_frames = batch.motion_frames
    if training.motion_drift > 0:
        motion_frames = drift(motion_frames, training.motion_drift, generator)
    level = noise = None
    if told.motion_noise > 0:
        level = told.motion_noise * torch.rand(count, generator=generator)
        noise = torch.randn(batch.motion_frames.shape, generator=generator).to(device)
    lips = None
    if unet.lips is not None:
        lips = unet.lips.normalise(batch.lip_window.to(device))
        lips = lips + training.lip_noise * torch.randn(lips.shape, generator=generator).to(device)
    heard = (torch.rand(count, generator=generator) >= training.audio_dropout).to(device)[:, None, None]
    return build(
        config,
        batch.identity.to(device),
        motion_frames.to(device),
        batch.audio_window.to(device) * heard,
        lips,
        None if level is None else level.to(device),
        noise,
    )


@torch.no_grad()
def validate(denoiser: Denoiser, dataset: Dataset, clips: list[Clip], config: Config) -> dict[str, float]:
    """Mean losses on held-out speakers: the same examples, times and noise every time."""
    rows = []
    for index in range(_VALIDATION_BATCHES):
        step = 2**40 + index  # beyond any training step: these draws are never trained on
        rows.append(training_loss(denoiser, draw_batch(dataset, clips, config, step), config, step))
    return {f"val_{name}": float(torch.stack([row[name] for row in rows]).mean()) for name in ("simple", "lip")}


def _sample_video(path: Path, denoiser: Denoiser, dataset: Dataset, clips: list[Clip], config: Config) -> None:
    """The first moving held-out clip from its first frame and its sound, beside the truth."""
    clip = next((clip for clip in clips if clip.frames > 1), clips[0])
    truth = dataset.frames(clip)[:_SAMPLE_FRAMES]
    speech = dataset.labels(clip)["speech"][:_SAMPLE_FRAMES]
    frames = generate(denoiser, truth[0], speech, steps=config.sampling.steps, solver=config.sampling.solver)
    pairs = (np.concatenate([ours, real], axis=1) for ours, real in zip(frames, truth, strict=True))
    write_video(path, pairs, dataset.root / "clips" / f"{clip.clip}.mp4")


def _save_weights(path: Path, state: TrainingState, dataset: Dataset) -> None:
    config = state.unet.config
    examples = state.step * config.training.batch_size
    summary = {"steps": state.step, "examples": examples, "clips": len(dataset.split("train"))}
    info = {"training": summary, "license": dataset.info.get("licence_note")}
    save_checkpoint(path, state.ema.state_dict(), config, info)


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _append(path: Path, row: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: float(f"{value:.6g}") for name, value in row.items()}) + "\n")
