"""`dheads train`: from a prepared dataset to weights."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from tqdm import tqdm

from dheads.config import Config
from dheads.dataset.clips import ResidentClips, fits
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet
from dheads.system.devices import COMPILE_OPTIONS, usable_precision
from dheads.system.distributed import World, joined
from dheads.system.locks import alone
from dheads.system.signals import Ending
from dheads.training.batches import Batch, Batches
from dheads.training.objective import tallied, tally, training_loss
from dheads.training.records import Records
from dheads.training.rollout import RollOuts
from dheads.training.state import TrainingState, check_start, learning_rate
from dheads.training.threads import suit
from dheads.weights.checkpoints import load_model

_MAX_BAD_STEPS = 20  # in a row

log = logging.getLogger("dheads")

Totals = dict[str, tuple[float, float]]  # by name, sum and count of a step's values, over all processes


def train(
    config: Config,
    data: Path | str,
    run: Path | str,
    *,
    device: str = "cpu",
    init: str | None = None,
    progress: bool = True,
) -> Path:
    """Train on a prepared dataset; returns the path of the averaged weights, `run`/weights.safetensors.

    The folder `run` also gets config.toml, the last weights and the best, metrics.jsonl, events.jsonl, sample videos,
    and state.pt, from which the same call resumes an interrupted run without any difference in its results.
    init: name or path of weights to start from. Under torchrun every process calls this function and computes its share
    of each step; all of them must see the folder `run`.

    Raises DheadsError where the data does not fit the configuration, where `run` holds the state of another
    configuration or another process trains in it, where a step is bad and run.bad_steps is "stop", and after 20 bad
    steps in a row.
    """
    data, run = Path(data), Path(run)
    began = time.monotonic()
    dataset = _checked_dataset(config, data)
    with joined(device) as world, _exclusive(run, world):
        own_device, shown = world.device(device), progress and world.is_main
        # On a CPU the steps themselves use all cores.
        threads = min(8, max(1, (os.cpu_count() or 1) // world.local_size)) if own_device.type == "cuda" else 1
        batches = _batches(config, dataset, world, own_device, threads, shown)
        state = _initial_state(config, dataset, run, world, own_device, init)
        network = world.parallel(state.unet)
        precision = usable_precision(config.optimisation.precision, own_device)
        if precision != config.optimisation.precision:
            log.info("this machine has no bfloat16 arithmetic: training in float32")
        with ExitStack() as stack:
            ending = stack.enter_context(Ending())
            records = None
            if world.is_main:
                records = stack.enter_context(closing(Records(run, dataset, state, precision)))
            steps = config.optimisation.steps
            bar = tqdm(total=steps, initial=state.step, desc="train", unit="step", disable=not shown)
            stack.enter_context(bar)
            trainer = _Trainer(run, world, batches, state, Denoiser(state.unet, precision, network), network, began)
            trainer.run_steps(threads, ending, records, bar)
    return run / "weights.safetensors"


# --- Before the first step


def _checked_dataset(config: Config, data: Path) -> Dataset:
    dataset = Dataset(data)
    dataset.check(config)
    if not dataset.split("train"):
        raise DheadsError(f"{data}: has no clip in its train split; check clips.csv or the splits given to prepare")
    return dataset


@contextmanager
def _exclusive(run: Path, world: World) -> Iterator[None]:
    """Make the run folder, and lock it against other runs for the block. Raises DheadsError where that fails."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DheadsError(f"cannot make the folder {run}: {error.strerror}; choose another --out") from error
    with alone(run / ".lock") if world.is_main else nullcontext(True) as is_first:
        if not is_first:
            raise DheadsError(f"{run}: another dheads train is running there; wait for it, or choose another --out")
        yield


def _batches(
    config: Config, dataset: Dataset, world: World, device: torch.device, threads: int, progress: bool
) -> Batches:
    """The batches of the training split, whose clips are held in the device's memory where they fit."""
    clips, resident = dataset.split("train"), None
    if fits(dataset, clips, device):
        speech_dim = config.conditioning.speech_dim
        resident = ResidentClips(dataset, clips, speech_dim, device, threads=threads, progress=progress)
    return Batches(dataset, clips, config, config.run.accumulate * world.size, resident)


def _initial_state(
    config: Config, dataset: Dataset, run: Path, world: World, device: torch.device, init: str | None
) -> TrainingState:
    """The state saved in the run folder, or else a new one, with a network that is compiled if run.compile says so."""
    # fp32 arithmetic is PyTorch's default: exact matrix products, and TF32 in convolutions on GPUs that have it.
    torch.backends.cudnn.benchmark = True  # shapes are constant, so that trying every algorithm pays
    torch.manual_seed(config.optimisation.seed)
    unet = ExtendedUNet(config)
    if world.is_main and not (run / "state.pt").exists():
        _initialise(unet, dataset, init)
    world.share(unet.to(device).state_dict().values())
    suit(unet.train(), device, config.run.compile)
    state = TrainingState(unet, config, config.run.accumulate * world.size)
    state.resume(run / "state.pt")
    if len(set(world.gather(state.step))) > 1:
        raise DheadsError(f"{run}: not all processes see its state.pt; choose an --out that all machines share")
    if config.run.compile:
        unet.compile(options=COMPILE_OPTIONS)  # in place, so that the weights keep their names
    return state


def _initialise(unet: ExtendedUNet, dataset: Dataset, init: str | None) -> None:
    """Load the weights `init` into the network, with what was fitted for their codes; fit the rest to the data."""
    if init is not None:
        start, start_config, _ = load_model(init)
        check_start(unet.config, start_config, init)
        unet.start_from(start.state_dict())
    elif unet.lip_predictor is not None:
        clips = dataset.lip_clips("train")
        if not clips:
            raise DheadsError(
                f"{dataset.root}: has no video to train on, which the lip code needs; set extensions.codes.lips=false"
            )
        unet.lip_predictor.fit(clips)
    if unet.head_motion is not None and not unet.head_motion.moves:
        unet.head_motion.fit(dataset.motion_clips("train"))


# --- Steps


class _Trainer:
    """Takes the steps of a run. Every process computes its own share of a step's batches."""

    def __init__(
        self,
        run: Path,
        world: World,
        batches: Batches,
        state: TrainingState,
        denoiser: Denoiser,
        network: nn.Module,
        began: float,
    ) -> None:
        """network: the one that the denoiser runs. began: time.monotonic() at the start of the run."""
        self._run, self._world, self._batches, self._state = run, world, batches, state
        self._denoiser, self._network, self._config = denoiser, network, state.config
        accumulate = self._config.run.accumulate
        self._parts = range(world.rank * accumulate, (world.rank + 1) * accumulate)  # of this process
        self._roll_out = RollOuts(state.ema, self._config)
        self._names = tallied(self._config)
        self._counted = began  # time.monotonic() until which state.seconds counts
        self._pace = _Pace(state.step)

    def run_steps(self, threads: int, ending: Ending, records: Records | None, bar: tqdm[NoReturn]) -> None:
        """Train until the run is done or a signal ends it.

        threads: how many prepare batches. records: None in all processes but the main one. Raises DheadsError for a bad
        step where run.bad_steps is "stop", and for too many of them in a row.
        """
        state, stopped_by = self._state, None
        steps = range(state.step, self._config.optimisation.steps)
        keys = ((step, part) for step in steps for part in self._parts)
        with closing(self._batches.ahead(keys, threads)) as queue:
            ended = False
            while not (state.is_done or ended):
                step, step_began = state.step, time.perf_counter()
                totals, asked, seconds = self._gradient(queue, step, ending)
                trouble = self._advance(totals, step, seconds)
                self._pace.worked += time.perf_counter() - step_began
                if trouble is None:
                    for name, (total, count) in totals.items():
                        state.note(name, total, count)
                else:
                    stopped_by = self._handle_bad_step(trouble, step, totals, records)
                ended = asked or stopped_by is not None
                bar.total = round(state.step / state.progress)
                bar.update()
                self._write(totals, records, bar, ended)
        if stopped_by is not None:
            raise DheadsError(f"{self._run}: {stopped_by}; the same command resumes the run after that step")

    def _gradient(self, queue: Iterator[Batch], step: int, ending: Ending) -> tuple[Totals, bool, float]:
        """Compute the gradient of a step.

        Returns the losses and the gradient's norm, whether any process is asked to end, and the step's seconds. All
        are the same in all processes, so that they take the same decisions.
        """
        self._batches.rollout_step = self._state.rollout_step
        self._state.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(self._names), 2, device=next(self._state.unet.parameters()).device)
        for part in self._parts:
            waited_from = time.perf_counter()
            batch = next(queue)
            self._pace.waited += time.perf_counter() - waited_from
            batch = self._roll_out(batch, step, part)
            # Processes exchange gradients once a step.
            with nullcontext() if part == self._parts[-1] else self._world.apart(self._network):
                terms = training_loss(self._denoiser, batch, self._config, step, part)
                loss = terms["loss"].mean() / self._config.run.accumulate
                loss.backward()
            sums += tally(terms, self._config)
        norm, now = float(self._state.clip_gradient()), time.monotonic()
        others = sums.new_tensor([[norm, 1], [ending.asked, 1], [now - self._counted, 1]])
        self._counted = now
        rows = self._world.total(torch.cat([sums, others])).tolist()
        *values, (asked, _), (seconds, count) = [(total, count) for total, count in rows]
        totals = dict(zip((*self._names, "grad_norm"), values, strict=True))
        return totals, asked > 0, seconds / count

    def _advance(self, totals: Totals, step: int, seconds: float) -> str | None:
        """Take the step of the optimiser; returns what is wrong with a bad one."""
        rate = learning_rate(self._config, step, self._state.progress)
        return self._state.advance(_mean(totals["loss"]), _mean(totals["grad_norm"]), rate, seconds)

    def _handle_bad_step(self, trouble: str, step: int, totals: Totals, records: Records | None) -> str | None:
        """Record a bad step; returns why the run is to stop, if it is. Raises DheadsError for too many in a row."""
        state, run = self._state, self._config.run
        clips = [clip.clip for part in range(state.parts) for clip in self._batches.clips_of(step, part)]
        if records:
            loss, norm = _mean(totals["loss"]), _mean(totals["grad_norm"])
            records.journal.event(state.step, "bad_step", trouble, loss=loss, norm=norm, clips=clips)
        if state.bad_in_a_row == _MAX_BAD_STEPS:
            raise DheadsError(
                f"{self._run}: {trouble}, as at each of the last {_MAX_BAD_STEPS} steps; "
                + ("set run.compile=false, or " if run.compile else "")
                + "lower optimisation.learning_rate, and start from good weights by --init in another --out"
            )
        return f"{trouble} (clips {', '.join(clips)})" if run.bad_steps == "stop" else None

    def _write(self, totals: Totals, records: Records | None, bar: tqdm[NoReturn], ended: bool) -> None:
        """Write what is due after a step: validation and metrics, weights and state, sample videos."""
        state, run = self._state, self._config.run
        log_due, save_due, sample_due = (
            state.step % interval == 0 or state.is_done
            for interval in (run.log_every, run.checkpoint_every, run.sample_every)
        )
        validation = records.validate() if records and (log_due or save_due) else {}
        if log_due:
            row, broken = self._finish_row(), self._broken_clips()
            if records:
                records.log(row | validation, broken)
                speed, loss = row["examples_per_second"], _mean(totals["loss"])
                bar.set_postfix_str(f"{speed:.3g} examples/s, loss {loss:.4f}")
        if records and save_due:
            records.save_weights(validation.get("val_loss"), last=state.is_done)
        if records and (save_due or ended):
            records.save_state()
        if records and sample_due:
            records.save_samples()

    def _finish_row(self) -> dict[str, float]:
        """The metrics since the last row."""
        state, pace = self._state, self._pace
        row = state.finish_row() | {"lr": learning_rate(self._config, state.step, state.progress)}
        examples = (state.step - pace.step) * state.parts * self._config.optimisation.batch_size
        row["examples_per_second"] = examples / pace.worked
        row["waiting"] = pace.waited / pace.worked
        self._pace = _Pace(state.step)
        return row

    def _broken_clips(self) -> dict[str, str]:
        """The clips that any process could not read so far, and why."""
        broken: dict[str, str] = {}
        for found in self._world.gather(dict(self._batches.broken)):
            assert isinstance(found, dict)
            broken |= found
        return broken


@dataclass
class _Pace:
    """Where the time went since the last log row."""

    step: int  # of the last row
    worked: float = 0.0  # seconds in steps, waiting included
    waited: float = 0.0  # seconds in which the next batch was not ready


def _mean(total: tuple[float, float]) -> float:
    return total[0] / total[1]
