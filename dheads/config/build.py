"""A complete configuration: its checks, and how it is read from dictionaries and written as TOML."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import tomli_w

from dheads.config.bounds import check_bounds
from dheads.config.extensions import ExtensionsConfig
from dheads.config.old_keys import renamed
from dheads.config.sections import (
    AlignmentConfig,
    ConditioningConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimisationConfig,
    PreparationConfig,
    RunConfig,
    SamplingConfig,
)
from dheads.errors import DheadsError

_MOST_LEVELS = 8  # of the U-Net


@dataclass(frozen=True)
class Config:
    """The complete description of a model and its training, stored in every checkpoint."""

    name: str = "custom"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    preparation: PreparationConfig = field(default_factory=PreparationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    extensions: ExtensionsConfig = field(default_factory=ExtensionsConfig)

    def __post_init__(self) -> None:
        """Raises DheadsError for numbers out of their bounds, and where the sections do not fit together."""
        for section in dataclasses.fields(self):
            if section.name != "name":
                check_bounds(section.name, getattr(self, section.name))
        for problem in _problems(self):
            raise DheadsError(f"configuration: {problem}")


def _problems(config: Config) -> typing.Iterator[str]:
    """What is wrong between sections, a sentence each."""
    network, patches = config.network, config.extensions.patches
    if config.sampling.steps > config.diffusion.num_steps:
        yield (f"sampling.steps is {config.sampling.steps}, but diffusion.num_steps only {config.diffusion.num_steps}")
    if not 1 <= len(network.channel_mult) <= _MOST_LEVELS:
        yield f"network.channel_mult must have 1 to {_MOST_LEVELS} numbers, a level each"
    coarsest = patches.size * 2 ** (len(network.channel_mult) - 1)
    if network.image_size % coarsest:
        yield (
            f"network.image_size is {network.image_size}, but must be a multiple of {coarsest} "
            "(extensions.patches.size times 2 for every level of channel_mult after the first)"
        )
    if patches.detail_channels and patches.size % 2:
        yield f"extensions.patches.detail_channels needs an even extensions.patches.size, not {patches.size}"
    if config.extensions.copying.gates and config.conditioning.motion_frames < 1:
        yield "extensions.copying.gates needs conditioning.motion_frames of 1 or more"
    if config.extensions.copying.gates and config.extensions.snr_clip is None:
        yield "extensions.copying.gates needs extensions.snr_clip, for a loss that sees the gates"
    if config.extensions.warp.flow and config.extensions.snr_clip is None:
        yield "extensions.warp.flow needs extensions.snr_clip, for a loss that sees the photo moved"
    if config.extensions.warp.flow and "pose" not in config.extensions.codes:
        yield "extensions.warp.flow needs a table extensions.codes.pose"
    if config.extensions.mouth.channels and not config.extensions.warp.flow:
        yield "extensions.mouth.channels needs extensions.warp.flow, which moves the photo that the mouth is drawn from"
    if config.extensions.mouth.channels and network.image_size > 256:
        yield f"extensions.mouth.channels is for a network.image_size of 256 at most, not {network.image_size}"
    if config.extensions.warp.flow and config.extensions.copying.gates:
        yield "extensions.warp.flow takes the place of extensions.copying.gates; turn one off"


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dicts, lists and scalars, ready for JSON or TOML."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Absent keys take their defaults; keys of earlier versions are translated.

    Raises DheadsError for an unknown key (naming the nearest known one) and for a value of the wrong type.
    """
    built = _build(Config, renamed(values), "")
    assert isinstance(built, Config)
    return built


def to_toml(config: Config) -> str:
    """The configuration as a TOML file that `from_dict` takes back."""
    return toml_text(to_dict(config))


def toml_text(values: dict[str, Any]) -> str:
    """Nested dictionaries as a TOML file; keys that are None are left out, as TOML has no word for them."""
    return tomli_w.dumps(_without_none(values))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def override(config: Config, *changes: dict[str, Any]) -> Config:
    """`config` with the given (possibly partial, nested) values in place of its own; checked when all are in place.

    A code is turned off by None, or by false as in TOML: {"extensions": {"codes": {"lips": None}}}.
    """
    # Old keys are translated change by change, so that of an old and a new key the later one counts.
    return from_dict(functools.reduce(lambda base, top: renamed(_merge(base, top)), changes, to_dict(config)))


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        own = base.get(key)
        merged[key] = _merge(own, value) if isinstance(value, dict) and isinstance(own, dict) else value
    return merged


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise DheadsError(f"configuration: {path or 'the whole'} must be a table, not {values!r}")
    kinds = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
            raise DheadsError(f"configuration: unknown key {name}; did you mean {near[0]}?")
        built[key] = _value(kinds[key], value, name)
    return cls(**built)


def _value(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _build(kind, value, name)
    if isinstance(kind, type) and issubclass(kind, dict):
        if not isinstance(value, dict):
            raise DheadsError(f"configuration: {name} must be a table, not {value!r}")
        table = typing.get_args(kind.__orig_bases__[0])[1]  # type: ignore[attr-defined]
        on = {key: one for key, one in value.items() if one is not None and one is not False}
        return kind({key: _build(table, one, f"{name}.{key}") for key, one in on.items()})
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_value(typing.get_args(kind)[0], item, name) for item in value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise DheadsError(f"configuration: {name} is {value!r}, but must be one of {typing.get_args(kind)}")
        return value
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        raise DheadsError(f"configuration: {name} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    return value
