"""Everything that can be chosen about a model: frozen dataclasses, read from dictionaries or TOML, and four presets."""

from dheads.config.build import Config, from_dict, override, to_dict, to_toml, toml_text
from dheads.config.extensions import CodeConfig, ExtensionsConfig, MotionConfig, NoiseConfig
from dheads.config.presets import PRESETS, preset
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
from dheads.config.units import FPS, SAMPLE_RATE, AudioCodec

__all__ = [
    "FPS",
    "PRESETS",
    "SAMPLE_RATE",
    "AlignmentConfig",
    "AudioCodec",
    "CodeConfig",
    "ConditioningConfig",
    "Config",
    "DiffusionConfig",
    "ExtensionsConfig",
    "MotionConfig",
    "NetworkConfig",
    "NoiseConfig",
    "OptimisationConfig",
    "PreparationConfig",
    "RunConfig",
    "SamplingConfig",
    "from_dict",
    "override",
    "preset",
    "to_dict",
    "to_toml",
    "toml_text",
]
