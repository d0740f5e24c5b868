"""`dheads train`: a prepared dataset to weights."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dheads.config import FPS, Config, override, to_toml
from dheads.dataset.choice import choose_evenly
from dheads.dataset.clips import ResidentClips, fits
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import clip_path
from dheads.denoiser import Denoiser
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet
from dheads.media.sound import SAMPLES_PER_FRAME, load_waveform, wav_file
from dheads.media.writing import write_video
from dheads.sampling.engine import Engine
from dheads.sampling.talker import generate
from dheads.system.devices import COMPILE_OPTIONS, best_dtype
from dheads.system.distributed import joined
from dheads.system.files import complete_or_absent
from dheads.system.locks import alone
from dheads.system.signals import Ending
from dheads.training.batches import Batches
from dheads.training.journal import Journal
from dheads.training.objective import tallied, tally, training_loss, weighted_codes
from dheads.training.rollout import RollOuts
from dheads.training.state import TrainingState, check_start, learning_rate, numbered, prune, publish
from dheads.weights.checkpoints import load_model, save_checkpoint

_VALIDATION_STEP = 2**40  # beyond any training step: these draws are never trained on
_VALIDATION_EXAMPLES = 64
# What training does to its examples, and validation does not.
_CLEAN = {
    "motion": {"drift": 0.0, "holes": 0.0, "start_share": 0.0},
    "sound": {"dropout": 0.0},
    "rollouts": {"share": 0.0},
    "examples": {"augment": False, "other_clip_share": 0.0},
}
_SAMPLE_FRAMES = 3 * FPS
_MAX_BAD_STEPS = 20  # in a row

log = logging.getLogger("dheads")


def train(
    config: Config,
    data: Path | str,
    run: Path | str,
    *,
    device: str = "cpu",
    init: str | None = None,
    progress: bool = True,
) -> Path:
    """Train on a prepared dataset; returns the path of the EMA weights, `run`/weights.safetensors.

    `run` also gets config.toml, the last weights and the best, metrics.jsonl, events.jsonl, sample videos, and
    state.pt, from which a killed run goes on exactly where it was. `init`: weights to start from, by name or path.
    Under torchrun every process calls this and computes its share of each step; `run` must lie where all see it.

    Raises DheadsError when the data does not fit the configuration, when `run` holds another configuration's state or
    another process trains there, and when a gradient is bad and training.bad_steps says to stop, or too many in a row
    are.
    """
    data, run = Path(data), Path(run)
    optimisation, every = config.optimisation, config.run
    counted = time.monotonic()  # until when the state counts the time
    with ExitStack() as stack:
        # Data, processes, folder.
        dataset = Dataset(data)
        dataset.check(config)
        clips = dataset.split("train")
        if not clips:
            raise DheadsError(f"{data}: has no clip in its train split; check clips.csv or the splits given to prepare")
        here = stack.enter_context(joined(device))
        place = here.device(device)
        parts = every.accumulate * here.size  # batches a step
        own = range(here.rank * every.accumulate, (here.rank + 1) * every.accumulate)
        # On a CPU the steps want the cores themselves.
        threads = min(8, max(1, (os.cpu_count() or 1) // here.local_size)) if place.type == "cuda" else 1
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DheadsError(f"cannot make the folder {run}: {error.strerror}; choose another --out") from error
        if here.is_main and not stack.enter_context(alone(run / ".lock")):
            raise DheadsError(f"{run}: another dheads train is at work there; wait for it, or choose another --out")

        shown = progress and here.is_main
        resident = None
        if fits(dataset, clips, place):
            told = config.conditioning.speech_dim
            resident = ResidentClips(dataset, clips, told, place, threads=threads, progress=shown)
        batches = Batches(dataset, clips, config, parts, resident)

        # Network, its average, optimiser. The arithmetic of fp32 is PyTorch's default: exact matrix products, and on
        # GPUs that have it TF32 in convolutions.
        torch.backends.cudnn.benchmark = True  # shapes never change: trying every algorithm pays
        torch.manual_seed(optimisation.seed)
        unet = ExtendedUNet(config)
        if here.is_main and not (run / "state.pt").exists():
            _begin(unet, dataset, init)
        here.share(unet.to(place).state_dict().values())
        unet = unet.to(memory_format=torch.channels_last).train()
        state = TrainingState(unet, config, parts)
        state.resume(run / "state.pt")
        if len(set(here.gather(state.step))) > 1:
            raise DheadsError(f"{run}: not all processes see its state.pt; choose an --out that all machines share")
        if every.compile:
            unet.compile(options=COMPILE_OPTIONS)  # in place: the names of the weights stay
        network = here.parallel(unet)
        precision = optimisation.precision
        if precision == "bf16" and best_dtype(place) != torch.bfloat16:
            # Emulated, a step would take ten times as long.
            log.info("this machine has no bfloat16 arithmetic: training in float32")
            precision = "fp32"
        names = tallied(config)
        denoiser, rolled_out = Denoiser(unet, precision, network), RollOuts(state.ema, config)

        # What is shown and written.
        ending = stack.enter_context(Ending())
        records = stack.enter_context(closing(_Records(run, dataset, state, precision))) if here.is_main else None
        bar = tqdm(total=optimisation.steps, initial=state.step, desc="train", unit="step", disable=not shown)
        stack.enter_context(bar)

        # Steps.
        keys = ((step, part) for step in range(state.step, optimisation.steps) for part in own)
        queue = stack.enter_context(closing(batches.ahead(keys, threads)))
        logged, worked, waited = state.step, 0.0, 0.0  # the step of the last row, seconds since then
        ended, last_words = False, None
        while not (state.is_done or ended):
            step, step_began = state.step, time.perf_counter()
            batches.rollout_step = state.rollout_step
            state.optimizer.zero_grad(set_to_none=True)
            sums = torch.zeros(len(names), 2, device=place)
            for part in own:
                asked_at = time.perf_counter()
                batch = next(queue)
                waited += time.perf_counter() - asked_at
                batch = rolled_out(batch, step, part)
                # Processes exchange gradients once a step.
                with here.apart(network) if part != own[-1] else nullcontext():
                    terms = training_loss(denoiser, batch, config, step, part)
                    (terms["loss"].mean() / every.accumulate).backward()
                sums += tally(terms, config)
            # Sums and counts over all processes, so that all decide by the same numbers.
            norm, now = float(state.clip_gradient()), time.monotonic()
            told = torch.cat([sums, sums.new_tensor([[norm, 1], [ending.asked, 1], [now - counted, 1]])])
            totals = dict(zip((*names, "grad_norm", "asked", "seconds"), here.total(told).tolist(), strict=True))
            counted, ended = now, totals.pop("asked")[0] > 0
            loss, norm, seconds = (totals[name][0] / totals[name][1] for name in ("loss", "grad_norm", "seconds"))
            del totals["seconds"]
            trouble = state.advance(loss, norm, learning_rate(config, step, state.progress), seconds)
            worked += time.perf_counter() - step_began
            if trouble is None:
                for name, total in totals.items():
                    state.note(name, *total)
            else:
                clip_names = [clip.clip for index in range(parts) for clip in batches.clips_of(step, index)]
                if records:
                    records.journal.event(state.step, "bad_step", trouble, loss=loss, norm=norm, clips=clip_names)
                if state.bad_in_a_row == _MAX_BAD_STEPS:
                    raise DheadsError(
                        f"{run}: {trouble}, as at each of the last {_MAX_BAD_STEPS} steps; "
                        + ("set run.compile=false, or " if every.compile else "")
                        + "lower optimisation.learning_rate, and go on from good weights by --init in another --out"
                    )
                if every.bad_steps == "stop":
                    ended, last_words = True, f"{trouble} (clips {', '.join(clip_names)})"
            bar.total = round(state.step / state.progress)
            bar.update()

            # Every now and then.
            log_due, save_due, sample_due = (
                state.step % interval == 0 or state.is_done
                for interval in (every.log_every, every.checkpoint_every, every.sample_every)
            )
            validation = records.validate() if records and (log_due or save_due) else {}
            if log_due:
                row = state.finish_row() | {"lr": learning_rate(config, state.step, state.progress)}
                row["examples_per_second"] = (state.step - logged) * parts * optimisation.batch_size / worked
                row["waiting"] = waited / worked
                logged, worked, waited = state.step, 0.0, 0.0
                broken = {clip: why for found in here.gather(dict(batches.broken)) for clip, why in found.items()}
                if records:
                    records.log(row | validation, broken)
                    bar.set_postfix_str(f"{row['examples_per_second']:.3g} examples/s, loss {loss:.4f}")
            if records and save_due:
                records.save_weights(validation.get("val_loss"), last=state.is_done)
            if records and (save_due or ended):
                records.save_state()
            if records and sample_due:
                records.show()
        if last_words is not None:
            raise DheadsError(f"{run}: {last_words}; the same command goes on after that step")
    return run / "weights.safetensors"


def _begin(unet: ExtendedUNet, dataset: Dataset, init: str | None) -> None:
    """Take the weights of `init`, its lip code with them; or fit the lip code to the data."""
    if init is not None:
        start, theirs, _ = load_model(init)
        check_start(unet.config, theirs, init)
        known = unet.state_dict()
        unet.load_state_dict(known | {name: value for name, value in start.state_dict().items() if name in known})
    elif unet.lip_predictor is not None:
        clips = dataset.lip_clips("train")
        if not clips:
            raise DheadsError(
                f"{dataset.root}: has no video to train on, which the lip code needs; leave out extensions.codes.lips"
            )
        unet.lip_predictor.fit(clips)


class _Records:
    """What the main process writes of the run. A full disk or a lost clip is told, and the run goes on."""

    def __init__(self, run: Path, dataset: Dataset, state: TrainingState, precision: str) -> None:
        config = state.config
        self._run, self._dataset, self._state = run, dataset, state
        self._denoiser = Denoiser(state.ema, precision)
        self._held_out = dataset.split("val")
        still = {name: {"noise": 0.0, "event_share": 0.0} for name in config.extensions.codes}
        self._clean = override(config, {"extensions": _CLEAN | {"codes": still}})
        self._batches = Batches(dataset, self._held_out, self._clean) if self._held_out else None
        self._broken: dict[str, str] = {}
        self.journal = Journal(run, state.step)
        with self._going_on("config.toml is not written"), complete_or_absent(run / "config.toml") as part:
            part.write_text(to_toml(config), encoding="utf-8")

    def close(self) -> None:
        self.journal.close()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses on held-out speakers as they are: the same examples, times and noise every time."""
        if self._batches is None:
            return {}
        batches = -(-_VALIDATION_EXAMPLES // self._clean.optimisation.batch_size)
        with self._going_on("validation failed"):
            rows = [
                training_loss(self._denoiser, self._batches.batch(step, 0), self._clean, step)
                for step in range(_VALIDATION_STEP, _VALIDATION_STEP + batches)
            ]
            names = ("loss", "simple", "lip", *weighted_codes(self._clean))
            return {f"val_{name}": float(torch.stack([row[name] for row in rows]).mean()) for name in names}
        return {}

    def log(self, row: dict[str, float], broken: dict[str, str]) -> None:
        """One row of metrics; `broken`: the clips to train on that could not be read so far, and why."""
        broken = broken | (self._batches.broken if self._batches else {})
        if new := {clip: broken[clip] for clip in sorted(broken.keys() - self._broken.keys())}:
            message = f"{len(new)} clips cannot be read and are replaced by others: {' | '.join(new.values())}"
            self.journal.event(self._state.step, "broken_clips", message, clips=new)
            self._broken |= new
        counts = {"broken_clips": len(broken), "bad_steps": self._state.bad_steps}
        self.journal.log(self._state.step, row | counts)

    def save_weights(self, val_loss: float | None, last: bool) -> None:
        """The averaged weights under the step's name; as the newest; and as the best if the loss is lowest so far."""
        run, state = self._run, self._state
        optimisation = state.config.optimisation
        summary = {
            "steps": state.step,
            "examples": state.step * optimisation.batch_size * state.parts,
            "clips": len(self._dataset.split("train")),
        }
        info = {"training": summary, "license": self._dataset.info.get("licence_note")}
        with self._going_on("the weights are not saved", fatal=last):
            # Half the size, and more digits than the network computes with.
            dtype = torch.float16 if optimisation.precision == "bf16" else torch.float32
            save_checkpoint(numbered(run, state.step), state.ema.state_dict(), state.config, info, dtype)
            publish(numbered(run, state.step), run / "weights.safetensors")
            if val_loss is not None and val_loss < state.best:
                publish(numbered(run, state.step), run / "best.safetensors")
                state.best = val_loss
            prune(run, state.step, state.config.run.keep)

    def save_state(self) -> None:
        with self._going_on("the training state is not saved"):
            self._state.save(self._run / "state.pt")

    def show(self) -> None:
        """A video of each of some held-out clips from its first frame and its sound, beside the truth."""
        config, folder = self._state.config, self._run / "samples"
        for clip in choose_evenly(self._held_out or self._dataset.split("train"), config.run.sample_clips):
            with self._going_on(f"no sample video of {clip.clip}"):
                folder.mkdir(exist_ok=True)
                truth = self._dataset.frames(clip)[:_SAMPLE_FRAMES]
                speech = self._dataset.labels(clip)["speech"][: len(truth)]
                ours = generate(Engine(self._state.ema), truth[0], speech)
                pairs = (np.concatenate(pair, axis=1) for pair in zip(ours, truth, strict=True))
                waveform = load_waveform(clip_path(self._dataset.root, clip.clip, "mp4"))
                sound = wav_file(waveform[: len(truth) * SAMPLES_PER_FRAME])
                write_video(folder / f"{self._state.step:07d}-{clip.clip.replace('/', '-')}.mp4", pairs, sound)

    @contextmanager
    def _going_on(self, what: str, fatal: bool = False) -> Iterator[None]:
        try:
            yield
        except (DheadsError, OSError, torch.OutOfMemoryError) as error:
            if fatal:
                raise
            self.journal.event(self._state.step, "failed", f"step {self._state.step}: {what}: {error}")
