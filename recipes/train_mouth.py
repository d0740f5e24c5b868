"""Train the mouth network of weights whose photo moves, and nothing else of them.

    dheads prepare RAW --out data-256 --preset small --set network.image_size=256
    python recipes/train_mouth.py --weights small --data data-256 --out weights.safetensors

The network sees frames as the weights draw them and learns what the true frames look like at 256 px. So that both show
the same mouth, the weights are given the true frame, blurred, under the noise of a middle step, and draw it from there
as in sampling. The loss is the difference from the true mouth and, as the mean of several possible mouths is blurred, a
discriminator's verdict on patches of it, with the difference of its features (Wang et al. 2018, pix2pixHD).

A photo's mouth is as true a mouth as that of its own frames, so from these alone the network would learn to show the
photo's: the corners of a smile would stay beside a rounded mouth. So the same faces are also drawn with the lip codes
of others. Such mouths have no true ones: the discriminator judges them, and what is drawn bounds them, by their colours
and by how far they are open.
"""

from __future__ import annotations

import copy
import itertools
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch_mesh import TorchMesh
from tqdm import tqdm

from dheads.conditioning import Cues
from dheads.config import Config, override
from dheads.dataset.clips import ResidentClips, fits
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.diffusion import SOLVERS, Denoised, Schedule, at_steps, q_sample, respaced
from dheads.extensions.lips import LipCode
from dheads.extensions.motion import box_blur, condition_with, pose_of
from dheads.extensions.mouth import SIZE, MouthBox, MouthNetwork, mouth_box, redrawn
from dheads.extensions.network import ExtendedUNet
from dheads.extensions.noise import NoiseSharing
from dheads.extensions.warp import enlarged_grid, resized, sampled, taken_from
from dheads.media.pixels import to_uint8
from dheads.system.devices import best_dtype, resolve_device
from dheads.training.batches import Batch, Batches
from dheads.training.state import update_ema
from dheads.weights.checkpoints import load, save_checkpoint

BEGUN_AT = (150, 200, 250, 320, 400)  # timesteps from which the weights draw the true frame
MOST_BLUR = 4  # times that the true frame is blurred by a 3 px box before
COLOUR_PX = 9  # of the box in which mouths without true ones have the colours that are drawn
OPENING_WEIGHT = 5.0  # of squared errors of the opening, in eye distances
SHOWN = 24  # held-out mouths in a picture


def main(
    data: Annotated[Path, typer.Option(help="Dataset prepared at 256 px.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    weights: Annotated[str, typer.Option(help="Weights to train the mouth network of: a name, or a file.")] = "small",
    channels: Annotated[int, typer.Option(help="Width of the mouth network.")] = 64,
    steps: Annotated[int, typer.Option(help="Training steps, at most.")] = 20_000,
    minutes: Annotated[float, typer.Option(help="Time after which training ends.")] = 1e9,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 4e-4,
    adversarial: Annotated[float, typer.Option(help="Weight of the discriminator's verdict.")] = 0.02,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Share of the first weights in what is saved.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Train the mouth network."""
    torch.manual_seed(0)
    checkpoint, place = load(weights), resolve_device(device)
    config = override(checkpoint.config, {"extensions": {"mouth": {"channels": channels}}})
    unet = ExtendedUNet(config).to(place).eval()
    unet.start_from({name: value.to(place) for name, value in checkpoint.tensors.items()})
    training = Training(unet, config, learning_rate, adversarial, keep)
    dataset = Dataset(data)
    batches, held_out = (batches_of(dataset, config, split, batch_size, place) for split in ("train", "val"))
    start, progress = time.monotonic(), 0.0
    with closing(batches.ahead(((step, 0) for step in itertools.count()), 1)) as ahead:
        for step in (bar := tqdm(range(steps), desc="mouth", unit="step")):
            progress = max(step / steps, (time.monotonic() - start) / 60 / minutes)
            if progress >= 1:
                break
            training.step(next(ahead), progress)
            if step % 100 == 0:
                bar.set_postfix_str(training.report())
    training.finish()
    print(training.judged([held_out.batch(step, 0) for step in range(max(1, 256 // batch_size))]))
    training.picture(held_out.batch(0, 0)).save(out.with_suffix(".png"))
    unet.mouth = training.average
    info = {**checkpoint.info, "mouth": f"{training.steps} steps of {batch_size}"}
    save_checkpoint(out, unet.state_dict(), config, info, torch.float16)
    typer.echo(out)


def batches_of(dataset: Dataset, config: Config, split: str, batch_size: int, device: torch.device) -> Batches:
    """Batches of a split at 256 px; those to train with vary in colours and geometry."""
    training = split == "train"
    examples = {"augment": training, "still_share": 0.4}
    changes = {"network": {"image_size": SIZE}, "optimisation": {"batch_size": batch_size}}
    config = override(config, {**changes, "extensions": {"examples": examples, "rollouts": {"share": 0.0}}})
    dataset.check(config)
    clips, speech_dim = dataset.split(split), config.conditioning.speech_dim
    resident = None
    if training and fits(dataset, clips, device):
        resident = ResidentClips(dataset, clips, speech_dim, device, threads=8, progress=True)
    return Batches(dataset, clips, config, source=resident)


class Training:
    """The mouth network, its discriminator and their optimisers."""

    def __init__(
        self, unet: ExtendedUNet, config: Config, learning_rate: float, adversarial: float, keep: float = 0.0
    ) -> None:
        """keep: share of the network's first weights in its average once training is finished."""
        assert unet.mouth is not None
        self.network, self.steps = unet.mouth.requires_grad_(True), 0
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        device = next(unet.parameters()).device
        self.judge = Discriminator().to(device)
        self._drawing, self._config = Drawing(unet, config), config
        self._learning_rate, self._adversarial = learning_rate, adversarial
        self._optimizer = torch.optim.AdamW(self.network.parameters(), learning_rate, (0.5, 0.99), weight_decay=0)
        self._judging = torch.optim.AdamW(self.judge.parameters(), learning_rate, (0.5, 0.99), weight_decay=0)
        self._bf16 = best_dtype(device) == torch.bfloat16
        self._first, self._keep = copy.deepcopy(self.network).requires_grad_(False), keep
        self._losses: dict[str, Tensor] = {}

    def step(self, batch: Batch, progress: float) -> None:
        """One step of both; progress: the part of the training that is done."""
        example, other = self._drawing(batch), self._drawing.with_other_lips(batch)
        rate = self._learning_rate * min(1, (self.steps + 1) / 200, 2.5 * (1 - progress))
        for group in self._optimizer.param_groups + self._judging.param_groups:
            group["lr"] = rate
        with torch.autocast(example.truth.device.type, torch.bfloat16, enabled=self._bf16):
            shown = example.drawn_by(self.network)
            shown_other = other.drawn_by(self.network)
            true_score = self.judge(example.truth, example)[-1]
            false_scores = [self.judge(a.detach(), b)[-1] for a, b in ((shown, example), (shown_other, other))]
            false = torch.stack([F.relu(1 + score).mean() for score in false_scores]).mean()
            verdict = F.relu(1 - true_score).mean() + false
            self._update(self._judging, self.judge, verdict)
            self.judge.requires_grad_(False)
            *features, score = self.judge(shown, example)
            *true_features, _ = self.judge(example.truth, example)
            score_other = self.judge(shown_other, other)[-1]
            self.judge.requires_grad_(True)
            same = torch.stack([F.l1_loss(a, b) for a, b in zip(features, true_features, strict=True)]).mean()
            error = (example.mask * (shown - example.truth).abs()).mean()
            change = box_blur(shown_other - other.enlarged, COLOUR_PX)
            colour = (other.mask * change.abs()).mean()
            # The discriminator is heard once it knows something.
            heard = self._adversarial * min(1, self.steps / 200)
            loss = error + colour + heard * (10 * same - score.mean() - score_other.mean())
        # Outside autocast, as bf16 would round landmarks to a pixel.
        opening = self._drawing.opening_error(other, shown_other.float())
        self._update(self._optimizer, self.network, loss + OPENING_WEIGHT * opening)
        update_ema(self.average, self.network, self.steps, 0.999)
        self._losses = {"error": error, "features": same, "verdict": verdict, "colour": colour, "opening": opening}
        self.steps += 1

    def _update(self, optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def finish(self) -> None:
        """Mix the first weights into the average: more of a photo's own detail stays (Wortsman et al. 2022)."""
        for mean, first in zip(self.average.parameters(), self._first.parameters(), strict=True):
            mean.lerp_(first, self._keep)

    def report(self) -> str:
        """The losses of the last step."""
        return ", ".join(f"{name} {loss.item():.4f}" for name, loss in self._losses.items())

    @torch.no_grad()
    def judged(self, batches: list[Batch]) -> dict[str, float]:
        """Of held-out mouths: the error, and the detail as a share of the truth's; both also as merely enlarged."""
        rows = []
        for batch in batches:
            example = self._drawing(batch)
            shown = example.drawn_by(self.average)
            rows.append([*_figures(example.enlarged, example), *_figures(shown, example)])
        names = ("error_enlarged", "detail_enlarged", "error", "detail")
        return dict(zip(names, np.mean(rows, axis=0).round(4).tolist(), strict=True))

    @torch.no_grad()
    def picture(self, batch: Batch) -> Image.Image:
        """Rows of held-out mouths: enlarged, as drawn, the truth, the photo moved; then with other lips, as drawn."""
        example, other = self._drawing(batch), self._drawing.with_other_lips(batch)
        columns = [example.enlarged, example.drawn_by(self.average), example.truth, example.moved]
        columns += [other.enlarged, other.drawn_by(self.average)]
        rows = torch.cat(columns, -1)[:SHOWN].clamp(-1, 1)
        pixels = to_uint8(rows).cpu().numpy()  # (n, h, 6 w, 3)
        half = (len(pixels) + 1) // 2
        return Image.fromarray(np.hstack([np.vstack(pixels[:half]), np.vstack(pixels[half : 2 * half])]))


class Example:
    """A batch of mouths, (B, ., h, w) each."""

    def __init__(self, frame: Tensor, moved: Tensor, truth: Tensor, box: MouthBox, pose: Tensor) -> None:
        """frame (B, 3, S, S): enlarged; truth (B, 3, S, S); pose (B, 6)."""
        self.frame, self.box, self.pose = frame, box, pose
        self.enlarged, self.moved, self.mask = box.cut(frame), moved, box.mask
        # Outside the mask nothing is drawn, so there the truth is what is shown.
        self.truth = torch.lerp(self.enlarged, box.cut(truth), self.mask)

    def drawn_by(self, network: MouthNetwork) -> Tensor:
        """As the network draws them."""
        return redrawn(network, self.enlarged, self.moved, self.mask)


class Drawing:
    """Draws mouths as sampling does, of true frames."""

    def __init__(self, unet: ExtendedUNet, config: Config) -> None:
        device = next(unet.parameters()).device
        precision = "bf16" if best_dtype(device) == torch.bfloat16 else "fp32"
        self._unet, self._config, self._device = unet, config, device
        self._denoiser, self._size = Denoiser(unet, precision), config.network.image_size
        self._noise, self._mesh = NoiseSharing(config, device), TorchMesh(config.alignment).to(device)
        self._schedules = [at_steps(self._denoiser.schedule, [0, t]) for t in BEGUN_AT]
        self._rng = np.random.default_rng(0)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Example:
        """The mouths of a batch at 256 px."""
        truth = batch.target.to(self._device)
        schedule: Schedule = self._schedules[self._rng.integers(len(self._schedules))]
        begun = resized(truth, self._size)
        for _ in range(self._rng.integers(MOST_BLUR + 1)):
            begun = box_blur(begun, 3)
        x_t = q_sample(schedule, begun, 1, torch.randn_like(begun))
        return self._drawn(batch, batch.cues, schedule, x_t, truth)

    @torch.no_grad()
    def with_other_lips(self, batch: Batch) -> Example:
        """The same faces with the lips and the sound of other examples, drawn from noise; they have no true mouths."""
        by = int(self._rng.integers(1, max(2, len(batch.target))))
        lips = batch.cues.codes[LipCode.name].roll(by, 0)
        cues = Cues(batch.cues.audio_window.roll(by, 0), {**batch.cues.codes, LipCode.name: lips})
        size, sampling = self._size, self._config.sampling
        schedule = respaced(self._denoiser.schedule, sampling.steps, sampling.spacing)
        x_T, _ = self._noise(torch.randn(len(lips), 1, 3, size, size, device=self._device), None)
        return self._drawn(batch, cues, schedule, x_T[:, 0])

    def _drawn(self, batch: Batch, cues: Cues, schedule: Schedule, x_t: Tensor, truth: Tensor | None = None) -> Example:
        """Mouths drawn from x_t (B, 3, H, W) of a schedule's last step. truth (B, 3, S, S): the frames, where known."""
        unet, config = self._unet, self._config
        photo, motion_frames = batch.identity.to(self._device), batch.motion_frames.to(self._device)
        frames = resized(motion_frames.flatten(0, 1), self._size).unflatten(0, motion_frames.shape[:2])
        cues = unet.normalise(cues.to(self._device))
        favour = config.extensions.warp.favour
        condition = condition_with(config, resized(photo, self._size), frames, cues, favour=favour)
        outputs = []

        def denoise(x_t: Tensor, t: int) -> Denoised:
            result, output = self._denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)
            outputs.append(output)
            return result

        x_0 = SOLVERS[config.sampling.solver](denoise, schedule, x_t, lambda: torch.randn_like(x_t)).clamp(-1, 1)
        assert condition.photo is not None
        taken = taken_from(condition.photo, outputs[-1].gates, outputs[-1].flow)
        pose, frame = pose_of(config, cues), resized(x_0, SIZE)
        box = mouth_box(config.alignment, pose)
        points = box.points(enlarged_grid(taken.grid, SIZE))
        return Example(frame, sampled(photo, points), frame if truth is None else truth, box, pose)

    def opening_error(self, example: Example, shown: Tensor) -> Tensor:
        """The mean squared difference of the openings of shown mouths (B, 3, h, w) from those of the drawn frames."""
        with torch.no_grad():
            drawn = self._mesh.opening(example.frame, example.pose)
        opening = self._mesh.opening(example.box.put(example.frame, shown), example.pose)
        return (opening - drawn).square().mean()


class Discriminator(nn.Module):
    """Judges patches of mouths, beside the same mouths as merely enlarged."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        widths = [7, channels, 2 * channels, 4 * channels]
        layers = [spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in itertools.pairwise(widths)]
        self.layers = nn.ModuleList([*layers, spectral_norm(nn.Conv2d(widths[-1], widths[-1], 3, 1, 1))])
        self.verdict = nn.Conv2d(widths[-1], 1, 3, 1, 1)

    def forward(self, shown: Tensor, example: Example) -> list[Tensor]:
        """The features of every layer, then the verdict (B, 1, h', w'), large for mouths taken to be true."""
        h = torch.cat([shown, example.enlarged, example.mask], 1)
        features = []
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
            features.append(h)
        return [*features, self.verdict(h)]


def _figures(shown: Tensor, example: Example) -> tuple[float, float]:
    """The mean error of 255, and the energy of fine detail as a share of the truth's, within the mask."""
    error = (example.mask * (shown - example.truth).abs()).mean() / example.mask.mean()
    shown_detail, true_detail = (
        (example.mask * (frames - box_blur(frames, 3)).square()).flatten(1).mean(1) for frames in (shown, example.truth)
    )
    return 127.5 * error.item(), (shown_detail / true_detail.clamp(min=1e-7)).median().item()


if __name__ == "__main__":
    typer.run(main)
