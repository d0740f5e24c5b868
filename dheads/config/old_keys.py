"""Keys of earlier versions, in checkpoints, run folders and users' TOML files, and what they are called now."""

from __future__ import annotations

import copy
from typing import Any

from dheads.errors import DheadsError

_NETWORK = """image_size model_channels channel_mult num_res_blocks attn_resolutions head_channels dropout max_period
learned_variance"""
_OPTIMISATION = """steps batch_size learning_rate weight_decay warmup_steps lr_schedule grad_clip ema_decay lambda_vlb
lambda_lip precision seed"""
_RUN = """minutes accumulate compile checkpoint_activations bad_steps log_every checkpoint_every keep sample_every
sample_clips"""
_EXAMPLES = "balance augment still_share speaker_cap source_cap other_clip_share"

RENAMED = {
    **{f"model.{key}": f"network.{key}" for key in _NETWORK.split()},
    "model.patch_size": "extensions.patches.size",
    "model.detail_channels": "extensions.patches.detail_channels",
    "model.copy_gates": "extensions.copying.gates",
    "conditioning.motion_noise": "extensions.motion.noise",
    "conditioning.hide_motion_mouth": "extensions.motion.hide_mouth",
    "conditioning.lip_context": "extensions.codes.lips.context",
    "conditioning.eye_context": "extensions.codes.eyes.context",
    "sampling.warm_steps": "extensions.noise.warm_steps",
    "sampling.guidance": "extensions.sound.guidance",
    "sampling.room_noise": "extensions.sound.room_noise",
    "sampling.blink_rate": "extensions.codes.eyes.event_rate",
    "sampling.shared_noise": "extensions.noise.shared",
    "sampling.outer_shared_noise": "extensions.noise.outer_shared",
    "sampling.outer_temperature": "extensions.noise.outer_temperature",
    "sampling.pause_shared_noise": "extensions.noise.pause_shared",
    "sampling.motion_noise": "extensions.motion.sampling_noise",
    "sampling.identity_anchor": "extensions.motion.anchor",
    **{f"training.{key}": f"optimisation.{key}" for key in _OPTIMISATION.split()},
    **{f"training.{key}": f"run.{key}" for key in _RUN.split()},
    **{f"training.{key}": f"extensions.examples.{key}" for key in _EXAMPLES.split()},
    "training.snr_clip": "extensions.snr_clip",
    "training.audio_dropout": "extensions.sound.dropout",
    "training.motion_drift": "extensions.motion.drift",
    "training.patch_drop": "extensions.motion.holes",
    "training.start_share": "extensions.motion.start_share",
    "training.rollout_share": "extensions.rollouts.share",
    "training.rollout_draws": "extensions.rollouts.steps",
    "training.rollout_from": "extensions.rollouts.start",
    "training.lip_noise": "extensions.codes.lips.noise",
    "training.lambda_eye": "extensions.codes.eyes.weight",
    "training.blink_share": "extensions.codes.eyes.event_share",
}
# Codes were on where they had dimensions: the code, and how many.
_SWITCHES = {"conditioning.lip_dims": ("lips", 3), "conditioning.eye_dims": ("eyes", 1)}


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration, perhaps partial, with earlier versions' keys under their present names.

    Raises DheadsError for a number of dimensions that a code cannot have.
    """
    if not isinstance(values, dict) or not _old_keys(values):
        return values
    new = copy.deepcopy(values)
    found = {name: new[section].pop(key) for section, key, name in _old_keys(values)}
    codes = _table(new, ["extensions", "codes"])
    are_on = {code: codes.get(code) not in (None, False) for code, _ in _SWITCHES.values()}
    for name, (code, dims) in _SWITCHES.items():
        if name in found:
            are_on[code] = _is_on(name, found.pop(name), dims)
    for name, value in found.items():
        *tables, key = RENAMED[name].split(".")
        _table(new, tables)[key] = value
    for code, is_on in are_on.items():
        codes[code] = (codes.get(code) or {}) if is_on else None
    return {section: table for section, table in new.items() if section not in ("model", "training") or table}


def _is_on(name: str, value: Any, dims: int) -> bool:
    if value not in (0, dims):
        raise DheadsError(f"configuration: {name} is {value!r}, but must be one of {(0, dims)}")
    return bool(value)


def _old_keys(values: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(section, key, both with a dot) of each of them."""
    return [
        (section, key, f"{section}.{key}")
        for section, table in values.items()
        if isinstance(table, dict)
        for key in table
        if f"{section}.{key}" in RENAMED or f"{section}.{key}" in _SWITCHES
    ]


def _table(values: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The table at that path, made where it is absent; one that is no table is left for the reader to refuse."""
    for name in path:
        if values.get(name) is None:
            values[name] = {}
        if not isinstance(values[name], dict):
            return {}
        values = values[name]
    return values
