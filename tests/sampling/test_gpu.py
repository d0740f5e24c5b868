"""What only a GPU shows: recorded graphs, asynchronous computation, lower precision, several processes.

Skipped without one. DHEADS_TEST_DEVICE=cpu runs the same on the CPU with small networks, which checks the tests
themselves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, program
from test_engine import PAPER, TINY, inputs, lively, on, plain, sampled, without_sound
from torch import Tensor
from torch import distributed as dist

from dheads.config import SAMPLE_RATE, Config, override, preset
from dheads.dataset.clips import ResidentClips
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.extensions.network import ExtendedUNet
from dheads.media.sound import load_waveform, wav_file
from dheads.sampling import engine as engines
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.system.devices import best_dtype
from dheads.system.distributed import World
from dheads.training import loop as verb
from dheads.training import objective, rollout
from dheads.training.batches import Batch, Batches, Lead, noise_on
from dheads.training.objective import training_loss
from dheads.training.rollout import RollOuts
from dheads.weights.checkpoints import load_model, save_checkpoint

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def device() -> torch.device:
    name = os.environ.get("DHEADS_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device(name)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 in all of its digits: TF32 has three."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def networks(device: torch.device) -> Callable[[str], ExtendedUNet]:
    """The packaged network, and one of the paper's size that depends on everything it is given; on a CPU a small one of
    each."""

    def network(name: str) -> ExtendedUNet:
        if device.type == "cpu":
            return lively({"packaged": TINY, "paper": PAPER}[name])
        torch.manual_seed(0)
        unet = load_model("small")[0] if name == "packaged" else lively(preset("crema"), 0.02)
        return unet.to(device)

    return network


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device gets the CPU's random numbers."""

    def noise(device: torch.device, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return noise_on(CPU, shape, generator).to(device)

    monkeypatch.setattr(objective, "noise_on", noise)
    monkeypatch.setattr(rollout, "noise_on", noise)
    monkeypatch.setattr(engines, "best_dtype", lambda device: torch.float32)


def spoken(config: Config, frames: int, seed: int) -> VideoSpec:
    size = config.network.image_size
    photo = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    generator = torch.Generator().manual_seed(seed)
    return VideoSpec(photo, torch.randn(frames, config.conditioning.speech_dim, generator=generator), seed)


def made(engine: Engine, videos: list[VideoSpec], slots: int) -> list[np.ndarray]:
    frames: dict[int, list[np.ndarray]] = {}
    for index, frame, last in in_lockstep(engine, videos, slots):
        frames.setdefault(index, []).append(frame)
        assert last is (len(frames[index]) == len(videos[index].speech))
    return [np.stack(frames[index]) for index in range(len(videos))]


# --- Frames


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("name", ["packaged", "paper"])
def test_frames_are_those_of_the_plain_computation(
    networks: Callable[[str], ExtendedUNet], device: torch.device, name: str, batch: int
) -> None:
    """The first frame, the second, which is recorded, and the third, which is replayed."""
    unet = networks(name)
    config = sampled(unet.config, steps=2, solver="ddim")
    engine = Engine(unet, config, torch.float32)
    assert engine.records is (device.type == "cuda")
    for _ in range(3):
        given = on(device, inputs(unet.config, batch, engine.noises))
        torch.testing.assert_close(engine.generate(given), plain(unet, given, config), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("solver", ["ddpm", "dpm++2m"])
@pytest.mark.parametrize("name", ["packaged", "paper"])
def test_replayed_frames_are_those_of_the_same_precision(
    networks: Callable[[str], ExtendedUNet], device: torch.device, name: str, solver: str
) -> None:
    """In bf16 where the device has it, with guidance, and where frames start from the last one; near float32, too."""
    unet, dtype = networks(name), best_dtype(device)
    for changes in ({}, {"sound": {"guidance": 1.5}}, {"noise": {"warm_steps": 2}}):
        config = sampled(unet.config, changes, steps=4, solver=solver)
        recorded = Engine(unet, config, dtype)
        eager = Engine(unet, config, dtype, recorded=False)
        for number in range(3):
            given = on(device, inputs(unet.config, 2, recorded.noises))
            ours = recorded.generate(given, first=number == 0)
            torch.testing.assert_close(ours, eager.generate(given, first=number == 0), rtol=0.02, atol=0.02)
        exact = Engine(unet, config, torch.float32).generate(given, first=False)
        assert (ours - exact).abs().mean() < 0.05


def test_guidance_is_that_of_the_plain_network(networks: Callable[[str], ExtendedUNet], device: torch.device) -> None:
    unet = networks("packaged")
    config = sampled(unet.config, steps=1, solver="ddim")
    given = on(device, inputs(unet.config, 3))
    heard, unheard = plain(unet, given, config), plain(unet, without_sound(given), config)
    engine = Engine(unet, sampled(config, {"sound": {"guidance": 1.5}}), torch.float32)
    wanted = unheard + 1.5 * (heard - unheard)
    inside = (heard.abs() < 1) & (unheard.abs() < 1) & (wanted.abs() < 1)  # before the last clamp
    for _ in range(3):
        torch.testing.assert_close(engine.generate(given)[inside], wanted[inside], rtol=1e-3, atol=3e-3)


def test_a_compiled_network_generates_the_same(networks: Callable[[str], ExtendedUNet], device: torch.device) -> None:
    unet = networks("packaged")
    config = sampled(unet.config, steps=2)
    compiled, eager = (Engine(unet, config, best_dtype(device), compiled=way) for way in (True, False))
    if device.type == "cpu":  # machine code takes a minute there
        compiled._denoise = torch.compile(eager._denoise, backend="eager", fullgraph=True, dynamic=False)
    for _ in range(3):
        given = on(device, inputs(unet.config, 1))
        ours = compiled.generate(given)
        assert ours.isfinite().all()
        assert (ours - eager.generate(given)).abs().mean() < 0.02


def test_slots_of_finished_videos_are_filled(networks: Callable[[str], ExtendedUNet], device: torch.device) -> None:
    """Each video is what it would be alone, to the rounding of another batch size."""
    unet = networks("packaged")
    engine = Engine(unet, sampled(unet.config, steps=2), torch.float32)
    videos = [spoken(unet.config, frames, seed) for seed, frames in enumerate((3, 7, 1, 5, 2))]
    together = made(engine, videos, 2)
    for video, ours in zip(videos, together, strict=True):
        (alone,) = made(engine, [video], 1)
        assert np.abs(ours.astype(int) - alone).max() <= 2
    if device.type == "cuda":
        assert {batch for batch, _ in engine._graphs} == {1, 2}


# --- Training


@pytest.fixture(scope="module")
def train_speed() -> ModuleType:
    module = program("benchmarks/train_speed.py")
    module.CLIPS, module.CLIP_FRAMES = 6, 12
    return module


@pytest.fixture(scope="module")
def data(train_speed: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_speed.random_dataset(tmp_path_factory.mktemp("random"), TINY)


def test_batches_made_on_the_device_are_the_readers(data: Path, device: torch.device) -> None:
    """Up to the rounding of float32, which may change a coefficient of JPEG by one step."""
    config = override(TINY, {"optimisation": {"batch_size": 64}})
    dataset = Dataset(data)
    clips = dataset.split("train")
    tables = ResidentClips(dataset, clips, config.conditioning.speech_dim, device, threads=2)
    reader, resident = Batches(dataset, clips, config), Batches(dataset, clips, config, 1, tables)
    step = config.optimisation.steps - 1  # where there are leads
    wanted, (batch,) = reader.batch(step, 0), resident.ahead([(step, 0)], 1)
    assert batch.clips == wanted.clips
    for mine, other in ((batch, wanted), (batch.lead, wanted.lead)):
        values, given = tensors(mine), tensors(other)
        assert values.keys() == given.keys()
        for name, value in values.items():
            assert value.device.type == device.type, name
            gap = (value.cpu().float() - given[name].float()).abs()
            assert (gap > 1e-3).float().mean() < 2e-3, name
            assert gap.mean() < 1e-4, name


def tensors(batch: Batch | Lead) -> dict[str, Tensor]:
    """Everything in a batch that is a tensor, by name."""
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    boxes = getattr(batch, "code_boxes", {})
    found |= {f"box of {name}": box for name, box in boxes.items()}
    found |= {"audio_window": batch.cues.audio_window, **batch.cues.codes}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("config", [TINY, PAPER], ids=["tiny", "paper"])
def test_a_training_step_is_the_cpus(data: Path, device: torch.device, same_noise: None, config: Config) -> None:
    dataset = Dataset(data)
    config = override(config, {"network": {"dropout": 0.0}})
    batch = Batches(dataset, dataset.split("train"), config).batch(0, 0)
    gradients, losses = [], []
    for where in (CPU, device):
        torch.manual_seed(0)
        unet = lively(config).requires_grad_(True).to(where, memory_format=torch.channels_last).train()
        loss = training_loss(Denoiser(unet), batch, config, 3)["loss"]
        loss.mean().backward()
        losses.append(loss.detach().cpu())
        gradients.append([p.grad.cpu() for p in unet.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) > 20
    flat = [torch.cat([gradient.flatten() for gradient in found]) for found in gradients]
    assert (flat[1] - flat[0]).norm() < 1e-2 * flat[0].norm()
    # The gradient of a bias before a GroupNorm with one channel a group is zero, but for rounding (1e-21 in float64).
    rounding = 1e-3 * float(flat[0].abs().max())
    for mine, other in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()) + rounding)


def test_a_compiled_step_in_bf16_is_near_the_plain_one(data: Path, device: torch.device) -> None:
    dataset = Dataset(data)
    batch = Batches(dataset, dataset.split("train"), TINY).batch(0, 0)
    losses = []
    for precision, compiled in (("fp32", False), ("bf16", True)):
        torch.manual_seed(0)
        unet = lively(TINY).requires_grad_(True).to(device, memory_format=torch.channels_last).train()
        if compiled:
            unet.compile(backend="eager" if device.type == "cpu" else "inductor")
        loss = training_loss(Denoiser(unet, precision), batch, TINY, 3)["loss"].mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in unet.parameters() if p.grad is not None)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_roll_outs_are_the_cpus(data: Path, device: torch.device, same_noise: None) -> None:
    """Also after the network has changed."""
    config = override(TINY, {"optimisation": {"batch_size": 16}})
    dataset = Dataset(data)
    step = config.optimisation.steps - 1
    batch = Batches(dataset, dataset.split("train"), config).batch(step, 0)
    unet = lively(config)
    theirs = lively(config).to(device)
    here, there = RollOuts(unet, config), RollOuts(theirs, config)
    for scale in (1.0, 1.1):
        for parameter in unet.parameters():
            parameter.mul_(scale)
        theirs.load_state_dict(unet.state_dict())
        wanted, ours = here(batch, step).motion_frames, there(batch, step).motion_frames
        torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-2, atol=1e-2)


def test_a_resumed_run_goes_on_as_the_unbroken_one(
    data: Path, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With roll-outs and sample videos; to what a GPU's sums differ by from run to run."""
    often = {"log_every": 1, "checkpoint_every": 2, "sample_every": 3, "sample_clips": 1}
    extensions = {"rollouts": {"start": 0.3}, "codes": {"lips": None}}
    config = override(TINY, {"optimisation": {"steps": 6}, "run": often, "extensions": extensions})

    def interrupted(denoiser: Denoiser, batch: Batch, config: Config, step: int, part: int) -> dict[str, Tensor]:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return training_loss(denoiser, batch, config, step, part)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    verb.train(config, data, whole, device=str(device), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(verb, "training_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verb.train(config, data, broken, device=str(device), progress=False)
    verb.train(config, data, broken, device=str(device), progress=False)
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, broken)
    ]
    assert len(losses[0]) == len(losses[1]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert len(list((broken / "samples").iterdir())) == 2


# --- Several processes


def test_two_processes_share_a_card(device: torch.device, examples: Path, tmp_path: Path) -> None:
    """Each makes the video that it makes alone."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(weights, ExtendedUNet(TINY).state_dict(), TINY, {})
    sound = tmp_path / "second.wav"
    sound.write_bytes(wav_file(load_waveform(examples / "speech.wav")[:SAMPLE_RATE]).getvalue())

    def begin(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dheads", "sample", str(examples / "face.jpg"), str(sound)]
        options = ["-o", str(tmp_path / name), "--weights", str(weights), "--steps", "2", "--device", device.type]
        return subprocess.Popen([*command, *options, "--quiet"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})

    names = ["a.mp4", "b.mp4", "alone.mp4"]
    pair = [begin(name) for name in names[:2]]
    assert [process.wait(120) for process in pair] == [0, 0]
    assert begin(names[2]).wait(120) == 0
    videos = [decoded(tmp_path / name) for name in names]
    assert len(videos[0]) == 25
    for ours in videos[:2]:
        assert np.abs(ours.astype(int) - videos[2]).mean() < 0.5


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_gradients_are_exchanged_by_the_cards_own_library(device: torch.device) -> None:
    """A group of one process checks that the library is installed and works on this card's tensors."""
    own = torch.device(device.type, 0) if device.type == "cuda" else device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        two = World(rank=0, size=2)  # one of two processes; the other is absent
        unet = lively(TINY).requires_grad_(True).to(own)
        network = two.parallel(unet)
        two.share(unet.state_dict().values())
        given = on(own, inputs(TINY, 2))
        condition = Engine(unet, sampled(TINY, steps=2, solver="ddpm"), torch.float32).condition(given)
        network(given.noise[:, 0], torch.tensor([3, 500], device=own), condition).prediction.sum().backward()
        assert unet.stem.weight.grad is not None
        assert unet.stem.weight.grad.abs().max() > 0
        assert two.total(torch.ones(3, device=own)).tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()
