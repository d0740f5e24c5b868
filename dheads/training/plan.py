"""The cost of training a configuration, found from the shapes of its tensors without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dheads.conditioning import Cues
from dheads.config import Config, override
from dheads.extensions.codes import codes_of
from dheads.extensions.motion import MotionCondition
from dheads.extensions.network import ExtendedUNet
from dheads.extensions.warp import moved_photo
from dheads.model import Layer


@dataclass(frozen=True)
class Plan:
    """The size of a training run. One multiply-add is two FLOPs; a backward pass costs two forward passes."""

    config: Config
    clips: int | None  # in the training split; None: unknown
    processes: int
    parameters: int
    forward_flops: int  # of one example
    state_bytes: int  # of a process: weights, gradients, Adam's two moments, EMA; float32
    activation_bytes: int  # of a process: tensors that a batch's forward pass keeps for the backward pass

    @property
    def effective_batch(self) -> int:
        """Examples in one step of the optimiser."""
        return self.config.optimisation.batch_size * self.config.run.accumulate * self.processes

    @property
    def step_flops(self) -> int:
        """FLOPs of one step of the optimiser, over all processes."""
        passes = 4 if self.config.run.checkpoint_activations else 3
        return passes * self.effective_batch * self.forward_flops

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of one process: see `plan`."""
        return self.state_bytes + self.activation_bytes

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps that use as many examples as there are clips; None: unknown."""
        return None if self.clips is None else self.clips / self.effective_batch

    @property
    def epochs(self) -> float | None:
        return self.config.optimisation.steps / self.steps_per_epoch if self.steps_per_epoch else None

    def summary(self) -> str:
        """The plan in one line."""
        minutes = self.config.run.minutes
        return (
            f"{_short(self.parameters, '')} parameters, {self.config.optimisation.steps:,} steps of "
            f"{self.effective_batch:,} examples{f' in at most {minutes:g} minutes' if minutes else ''}, about "
            f"{_memory(self.memory_bytes)} of memory a process"
        )

    def lines(self) -> list[str]:
        """The plan as aligned lines of text."""
        optimisation, accumulate = self.config.optimisation, self.config.run.accumulate
        batch = f"{self.effective_batch:,} examples a step: {optimisation.batch_size} at once"
        if accumulate > 1:
            batch += f" x {accumulate} accumulated"
        if self.processes > 1:
            batch += f" x {self.processes} processes"
        rows = {
            "parameters": _short(self.parameters, ""),
            "forward pass": f"{_short(self.forward_flops, 'FLOP')} an example",
            "step": _short(self.step_flops, "FLOP"),
            "memory": f"about {_memory(self.memory_bytes)} a process: {_memory(self.activation_bytes)} activations, "
            f"{_memory(self.state_bytes)} weights, gradients, Adam, EMA",
            "batch": batch,
            "learning rate": f"{optimisation.learning_rate:g} ({optimisation.lr_schedule} schedule)",
            "steps": f"{optimisation.steps:,}, {_short(optimisation.steps * self.effective_batch, '')} examples",
        }
        if self.clips and self.steps_per_epoch and self.epochs:
            rows["epochs"] = f"{self.epochs:,.4g} of {self.clips:,} clips, {self.steps_per_epoch:,.4g} steps each"
        return [f"{name:<13}  {text}" for name, text in rows.items()]


def plan(config: Config, clips: int | None, processes: int = 1) -> Plan:
    """The size of the run that `config` describes; clips: how many the training split has, None if unknown.

    The memory is an estimate of the tensors on a GPU: the state in float32, and the activations that autograd keeps for
    a batch, in the types that CUDA's autocast gives them. Not included are cuDNN's workspaces, the allocator's reserve,
    and the savings of torch.compile.
    """
    with FakeTensorMode():
        # The effect of checkpointing is computed below, from the tensors that each layer keeps without it.
        unet = ExtendedUNet(override(config, {"run": {"checkpoint_activations": False}})).train()
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        with FlopCounterMode(display=False) as counter:
            activations = _activation_bytes(unet, config)
    return Plan(
        config=config,
        clips=clips,
        processes=processes,
        parameters=parameters,
        forward_flops=counter.get_total_flops() // config.optimisation.batch_size,
        state_bytes=5 * 4 * parameters,
        activation_bytes=activations,
    )


def _inputs(config: Config, count: int) -> tuple[Tensor, Tensor, MotionCondition]:
    """x_t, t and the condition of that many examples."""
    cond, size = config.conditioning, config.network.image_size
    contexts = {code.name: config.extensions.codes[code.name].context for code in codes_of(config)}
    cues = Cues(
        torch.zeros(count, 2 * cond.audio_context + 1, cond.speech_dim),
        {code.name: torch.zeros(count, 2 * contexts[code.name] + 1, code.dims) for code in codes_of(config)},
    )
    identity, motion_frames = torch.zeros(count, 3, size, size), torch.zeros(count, cond.motion_frames, 3, size, size)
    # Not by condition_with, which keeps the mouth mask: a fake tensor must not be kept.
    level = torch.zeros(count) if config.extensions.motion.noise > 0 else None
    photo = moved_photo(config, identity, torch.zeros(count, 6)) if config.extensions.warp.flow else None
    condition = MotionCondition(identity, motion_frames, cues, level, photo)
    return torch.zeros(count, 3, size, size), torch.zeros(count, dtype=torch.int64), condition


def _activation_bytes(unet: ExtendedUNet, config: Config) -> int:
    """The bytes of the tensors that the forward pass of one batch keeps for the backward pass."""
    weights = {_storage(parameter) for parameter in unet.parameters()}
    outside: dict[int, Tensor] = {}  # kept outside layers, by storage, as many operations keep the same one
    inside: list[dict[int, Tensor]] = []  # kept by each layer
    given: dict[int, Tensor] = {}  # the layers' inputs
    kept = outside

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor
        return tensor

    def enter(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
        nonlocal kept
        given.update({_storage(tensor): tensor for tensor in inputs})
        inside.append(kept := {})

    def leave(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal kept
        kept = outside

    for module in unet.modules():
        if isinstance(module, Layer):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=config.optimisation.precision == "bf16")
    with bf16, _LikeCuda(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(*_inputs(config, config.optimisation.batch_size))
    if config.run.checkpoint_activations:
        # A layer keeps only its inputs; the rest exists while the layer is recomputed, one layer at a time.
        return _size(outside | given) + max(map(_size, inside))
    return _size(outside | {key: tensor for layer in inside for key, tensor in layer.items()})


def _size(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    """Identifies a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


class _LikeCuda(TorchFunctionMode):
    """Makes operations on the CPU keep the same tensors as on CUDA, which PyTorch may have been built without."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.group_norm and torch.is_autocast_enabled("cpu"):
            # CUDA's autocast normalises in float32.
            return function(args[0].float(), *args[1:], **kwargs)
        if function is F.dropout and kwargs["p"] > 0:
            # On CUDA the mask has one byte an element.
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return function(*args, **kwargs)


def _short(number: float, unit: str) -> str:
    """A number with an SI prefix: 203929094 -> 203.9 M."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.4g} {prefix}{unit}"
    return f"{number:.4g} {unit}".rstrip()


def _memory(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
