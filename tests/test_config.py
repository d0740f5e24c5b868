"""Configurations: presets, strict reading, keys of earlier versions, and sections that do not fit together."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import re
import tomllib
from collections.abc import Iterator
from importlib import resources
from types import ModuleType
from typing import Any

import pytest

from dheads.config import (
    PRESETS,
    CodeConfig,
    Config,
    extensions,
    from_dict,
    override,
    preset,
    sections,
    to_dict,
    to_toml,
)
from dheads.config.old_keys import RENAMED
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_written_as_toml_is_read_back(name: str) -> None:
    config = preset(name)
    assert from_dict(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_toml_file(name: str) -> None:
    text = resources.files("dheads").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")
    assert preset(name) == from_dict({**tomllib.loads(text), "name": name})


def test_the_presets_are_all_files_of_their_folder() -> None:
    files = sorted(file.name for file in resources.files("dheads").joinpath("presets").iterdir())
    assert files == [f"{name}.toml" for name in PRESETS] == ["crema.toml", "lrw.toml", "small.toml", "tiny.toml"]


def test_any_text_and_any_number_come_back_from_toml() -> None:
    config = override(preset("tiny"), {"name": 'a "name"\n\t\\ \x07 ü 😀', "optimisation": {"grad_clip": math.inf}})
    assert from_dict(tomllib.loads(to_toml(config))) == config


def leaves(values: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dataclasses.Field]]:
    """The path and the field of every single value in a dataclass, and in the tables that it holds."""
    for one in dataclasses.fields(values):
        value, name = getattr(values, one.name), (*path, one.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, name)
        elif isinstance(value, dict):
            for key, table in value.items():
                yield from leaves(table, (*name, key))
        else:
            yield name, one


def at(values: object, path: tuple[str, ...]) -> Any:
    for name in path:
        values = values[name] if isinstance(values, dict) else getattr(values, name)
    return values


def nested(path: tuple[str, ...], value: object) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def numbers() -> Iterator[tuple[str, tuple[float, float] | None]]:
    """Name and bounds of every field that is a number, or several."""
    for path, one in leaves(preset("tiny")):
        if re.search(r"\b(int|float)\b", one.type) and "Literal" not in one.type:
            yield ".".join(path), one.metadata.get("bounds")


@pytest.mark.parametrize(("name", "bounds"), list(numbers()))
def test_every_number_has_bounds(name: str, bounds: tuple[float, float] | None) -> None:
    assert bounds is not None, "a field without bounds"
    path = tuple(name.split("."))
    value = at(preset("tiny"), path)
    beyond = [bounds[0] - 1, math.nan, *([] if math.isinf(bounds[1]) else [bounds[1] + 1])]
    for number in beyond:
        if isinstance(value, int) or (isinstance(value, tuple) and value and isinstance(value[0], int)):
            if math.isnan(number):
                continue
            number = int(number)
        with pytest.raises(DheadsError, match=rf"{re.escape(name)} (is|must be)"):
            override(preset("tiny"), nested(path, [number] if isinstance(value, tuple) else number))


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(DheadsError, match=r"sampling\.steps is 4, but diffusion\.num_steps only 3"):
        override(preset("tiny"), {"diffusion": {"num_steps": 3}})


def test_the_papers_presets_are_the_paper() -> None:
    for name, grayscale in (("crema", False), ("lrw", True)):
        config = preset(name)
        net, cond, optimisation = config.network, config.conditioning, config.optimisation
        assert (net.image_size, net.model_channels, net.channel_mult, net.num_res_blocks) == (128, 256, (1, 2, 3), 2)
        assert (net.dropout, net.learned_variance) == (0.1, True)
        assert (cond.motion_frames, cond.audio_context, cond.speech_dim) == (2, 2, 256)
        assert cond.grayscale_motion is grayscale
        assert (config.diffusion.num_steps, config.diffusion.prediction) == (1000, "eps")
        assert (optimisation.batch_size, optimisation.learning_rate, optimisation.lr_schedule) == (10, 5e-5, "paper")
        assert (optimisation.lambda_vlb, optimisation.lambda_lip) == (1e-4, 0.2)
        assert config.extensions == Config().extensions, "no extension is on"
    off = Config().extensions
    assert (off.patches.size, off.patches.detail_channels, off.copying.gates, off.codes) == (1, 0, False, {})
    assert (off.motion.noise, off.motion.hide_mouth, off.motion.drift, off.snr_clip) == (0, False, 0, None)
    assert (off.examples.augment, off.sound.dropout, off.rollouts.share) == (False, 0, 0)


def test_override_keeps_the_rest() -> None:
    changed = override(preset("tiny"), {"optimisation": {"steps": 7}, "name": "mine"})
    assert changed.optimisation.steps == 7
    assert changed.name == "mine"
    assert changed.network == preset("tiny").network


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimisation": {"step": 3}}, "unknown key optimisation.step; did you mean steps?"),
        ({"optimization": {}}, "did you mean optimisation?"),
        ({"optimisation": {"steps": "many"}}, "optimisation.steps must be int, not 'many'"),
        ({"extensions": {"examples": {"augment": 1}}}, "extensions.examples.augment must be bool"),
        ({"optimisation": 3}, "optimisation must be a table"),
        ({"extensions": {"codes": {"lips": 3}}}, "extensions.codes.lips must be a table, not 3"),
        ({"extensions": {"codes": {"lips": {"dims": 3}}}}, "unknown key extensions.codes.lips.dims"),
        ({"diffusion": {"prediction": "score"}}, "diffusion.prediction is 'score', but must be one of"),
        ({"conditioning": {"lip_dims": 2}}, "conditioning.lip_dims is 2"),
        ({"network": {"image_size": 33}}, "network.image_size is 33, but must be a multiple of 2"),
        ({"extensions": {"patches": {"size": 0}}}, "extensions.patches.size is 0, but must be 1 to 64"),
        ({"network": {"channel_mult": []}}, "network.channel_mult must have 1 to 8 numbers"),
        ({"network": {"channel_mult": [1, 0]}}, "network.channel_mult is 0, but must be 1 to 64"),
        (
            {"extensions": {"patches": {"detail_channels": 8}}},
            "extensions.patches.detail_channels needs an even extensions.patches.size, not 1",
        ),
        ({"conditioning": {"motion_frames": 0}}, "extensions.copying.gates needs conditioning.motion_frames"),
        ({"preparation": {"speech_tempos": [1, 9]}}, "preparation.speech_tempos is 9, but must be 0.5 to 2"),
        ({"extensions": {"snr_clip": None}}, "extensions.copying.gates needs extensions.snr_clip"),
        ({"training": {"steps": 3}, "optimisation": 3}, "optimisation must be a table"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DheadsError) as error:
        override(preset("tiny"), changes)
    assert message in str(error.value)


def test_unknown_presets_list_the_known() -> None:
    with pytest.raises(DheadsError, match="crema, lrw, small, tiny"):
        preset("huge")


# --- Codes


def test_a_code_is_turned_off_by_none() -> None:
    config = override(preset("tiny"), {"extensions": {"codes": {"lips": None}}})
    assert config.extensions.codes == {"eyes": preset("tiny").extensions.codes["eyes"]}
    assert override(config, {"extensions": {"codes": {"lips": {}}}}).extensions.codes["lips"] == CodeConfig()


def test_unknown_codes_are_refused_where_the_network_is_built() -> None:
    config = override(preset("tiny"), {"extensions": {"codes": {"brows": {"context": 1}}}})
    with pytest.raises(DheadsError, match=r"codes\.brows; the known ones are lips, eyes, pose$"):
        ExtendedUNet(config)


# --- Keys of earlier versions

# The packaged weights' configuration as they stored it at first.
OLD: dict[str, Any] = {
    "name": "small",
    "model": {
        "image_size": 128,
        "model_channels": 64,
        "channel_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "head_channels": 64,
        "dropout": 0.0,
        "max_period": 10000.0,
        "learned_variance": False,
        "patch_size": 4,
        "copy_gates": True,
        "detail_channels": 32,
    },
    "diffusion": {"num_steps": 1000, "cosine_s": 0.008, "beta_max": 0.999, "prediction": "x_0"},
    "conditioning": {
        "motion_frames": 2,
        "audio_context": 2,
        "speech_encoder": "whisper-tiny.en",
        "speech_dim": 384,
        "grayscale_motion": False,
        "identity_frame": "random",
        "motion_noise": 0.25,
        "hide_motion_mouth": True,
        "lip_dims": 3,
        "lip_context": 2,
        "eye_dims": 1,
        "eye_context": 2,
    },
    "alignment": {"eye_distance": 0.3, "eye_y": 0.38, "smooth_frames": 2.0, "landmarks": "mesh"},
    "preparation": {
        "min_face_px": 48.0,
        "max_gap": 5,
        "max_missing": 0.2,
        "max_jump": 0.25,
        "max_skew_seconds": 0.25,
        "speech_tempos": [0.85, 1.18],
    },
    "sampling": {
        "steps": 3,
        "solver": "dpm++2m",
        "spacing": "quadratic",
        "warm_steps": 0,
        "guidance": 1.0,
        "room_noise": 0.001,
        "blink_rate": 0.3,
        "shared_noise": 1.0,
        "outer_shared_noise": 0.9,
        "outer_temperature": 0.8,
        "pause_shared_noise": 0.99,
        "motion_noise": 0.0,
        "identity_anchor": 0.5,
    },
    "training": {
        "steps": 9250,
        "batch_size": 16,
        "accumulate": 1,
        "learning_rate": 0.0005,
        "weight_decay": 0.01,
        "warmup_steps": 100,
        "lr_schedule": "cooldown",
        "grad_clip": 1.0,
        "ema_decay": 0.999,
        "lambda_vlb": 0.0,
        "lambda_lip": 1.5,
        "balance": "speakers",
        "precision": "bf16",
        "compile": True,
        "checkpoint_activations": False,
        "bad_steps": "skip",
        "seed": 0,
        "log_every": 200,
        "checkpoint_every": 400,
        "keep": 3,
        "sample_every": 1000000,
        "sample_clips": 2,
        "snr_clip": 20.0,
        "augment": True,
        "audio_dropout": 0.1,
        "motion_drift": 1.0,
        "patch_drop": 0.15,
        "rollout_share": 0.25,
        "rollout_draws": 3,
        "rollout_from": 0.7,
        "lip_noise": 0.15,
        "lambda_eye": 1.0,
        "blink_share": 0.3,
        "start_share": 0.25,
        "still_share": 0.05,
        "speaker_cap": 0.25,
        "source_cap": 0.35,
        "other_clip_share": 0.25,
    },
}
# The same under the present keys. Values that the old one lacks are defaults.
NEW: dict[str, Any] = {
    "name": "small",
    "network": {
        "image_size": 128,
        "model_channels": 64,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (),
        "head_channels": 64,
        "dropout": 0.0,
        "max_period": 10000.0,
        "learned_variance": False,
    },
    "diffusion": OLD["diffusion"],
    "conditioning": {
        "motion_frames": 2,
        "audio_context": 2,
        "speech_encoder": "whisper-tiny.en",
        "speech_dim": 384,
        "grayscale_motion": False,
        "identity_frame": "random",
    },
    "alignment": OLD["alignment"],
    "preparation": OLD["preparation"] | {"speech_tempos": (0.85, 1.18), "max_offset_seconds": 0.2, "min_sync": 0.25},
    "sampling": {"steps": 3, "solver": "dpm++2m", "spacing": "quadratic"},
    "optimisation": {
        "steps": 9250,
        "batch_size": 16,
        "learning_rate": 0.0005,
        "weight_decay": 0.01,
        "warmup_steps": 100,
        "lr_schedule": "cooldown",
        "grad_clip": 1.0,
        "ema_decay": 0.999,
        "lambda_vlb": 0.0,
        "lambda_lip": 1.5,
        "precision": "bf16",
        "seed": 0,
    },
    "run": {
        "minutes": None,
        "accumulate": 1,
        "compile": True,
        "checkpoint_activations": False,
        "bad_steps": "skip",
        "log_every": 200,
        "checkpoint_every": 400,
        "keep": 3,
        "sample_every": 1000000,
        "sample_clips": 2,
    },
    "extensions": {
        "snr_clip": 20.0,
        "patches": {"size": 4, "detail_channels": 32},
        "copying": {"gates": True},
        "warp": {"flow": False, "landmark_weight": 0.01, "moved_weight": 2.0, "own_weight": 0.01, "favour": 0.0},
        "mouth": {"channels": 0},
        "motion": {
            "hide_mouth": True,
            "noise": 0.25,
            "sampling_noise": 0.0,
            "drift": 1.0,
            "holes": 0.15,
            "start_share": 0.25,
            "anchor": 0.5,
        },
        "codes": {
            "lips": {
                "context": 2,
                "noise": 0.15,
                "weight": 0.0,
                "event_share": 0.0,
                "event_rate": 0.3,
                "gain": 1.0,
                "shown": 0.0,
            },
            "eyes": {
                "context": 2,
                "noise": 0.0,
                "weight": 1.0,
                "event_share": 0.3,
                "event_rate": 0.3,
                "gain": 1.0,
                "shown": 0.0,
            },
        },
        "noise": {
            "shared": 1.0,
            "outer_shared": 0.9,
            "temperature": 1.0,
            "outer_temperature": 0.8,
            "pause_shared": 0.99,
            "warm_steps": 0,
        },
        "sound": {"dropout": 0.1, "guidance": 1.0, "room_noise": 0.001},
        "rollouts": {"share": 0.25, "steps": 3, "start": 0.7},
        "examples": {
            "balance": "speakers",
            "augment": True,
            "still_share": 0.05,
            "speaker_cap": 0.25,
            "source_cap": 0.35,
            "other_clip_share": 0.25,
        },
    },
}


def test_every_old_key_has_a_present_one() -> None:
    known = {".".join(path) for path, _ in leaves(preset("tiny"))}
    assert set(RENAMED.values()) <= known
    assert len(set(RENAMED.values())) == len(RENAMED)
    switches = {"conditioning.lip_dims", "conditioning.eye_dims"}
    old = {f"{section}.{key}" for section in OLD if section != "name" for key in OLD[section]}
    assert old <= RENAMED.keys() | switches | known


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_sets_its_present_one(old: str) -> None:
    """To a value that it does not have otherwise."""
    changes = {"network": {"image_size": 64}, "extensions": {"patches": {"size": 2}}, "optimisation": {"steps": 1000}}
    base, path = override(preset("tiny"), changes), tuple(RENAMED[old].split("."))
    value = other_than(at(base, path))
    changed = override(base, nested(tuple(old.split(".")), value))
    assert at(changed, path) == value
    assert changed == override(base, nested(path, value)) != base


def other_than(value: object) -> object:
    """Another valid value of a configuration."""
    words = {"cooldown": "paper", "speakers": "clips", "fp32": "bf16", "skip": "stop"}
    if isinstance(value, str):
        return words[value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 2
    if isinstance(value, tuple):
        return (*value, 2)
    return 5.5 if value is None else value / 2 + 0.07


def test_an_old_configuration_is_read_as_before() -> None:
    config = from_dict(OLD)
    assert to_dict(config) == NEW
    assert config == from_dict(NEW)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_old_codes_without_dimensions_are_off() -> None:
    silent = {**OLD, "conditioning": {**OLD["conditioning"], "lip_dims": 0, "eye_dims": 0}}
    assert from_dict(silent).extensions.codes == {}
    del silent["conditioning"]["lip_dims"], silent["conditioning"]["eye_dims"]
    assert from_dict(silent).extensions.codes == {}, "their default was 0"
    one = override(preset("tiny"), {"conditioning": {"eye_dims": 0}})
    assert one.extensions.codes.keys() == {"lips"}


def test_an_old_file_over_a_present_configuration_keeps_the_codes() -> None:
    base = preset("tiny")
    file = tomllib.loads("[training]\nsteps = 77\nlip_noise = 0.5\n[model]\ndropout = 0.25\n")
    config = override(base, file)
    lips = dataclasses.replace(base.extensions.codes["lips"], noise=0.5)
    assert config.extensions.codes == {"lips": lips, "eyes": base.extensions.codes["eyes"]}
    assert (config.optimisation.steps, config.network.dropout) == (77, 0.25)
    paper = override(preset("crema"), file)
    assert paper.extensions == preset("crema").extensions, "a code that is off stays off"
    assert override(preset("crema"), {"conditioning": {"lip_dims": 3}}).extensions.codes == {"lips": CodeConfig()}


def test_of_old_and_present_keys_the_later_change_counts() -> None:
    old, new = {"training": {"steps": 50}}, {"optimisation": {"steps": 70}}
    assert override(preset("tiny"), old, new).optimisation.steps == 70
    assert override(preset("tiny"), new, old).optimisation.steps == 50
    off, on = {"extensions": {"codes": {"lips": None}}}, {"conditioning": {"lip_dims": 3}}
    assert override(preset("tiny"), off, on).extensions.codes["lips"] == CodeConfig()
    assert override(preset("tiny"), on, off, {"training": {"lip_noise": 0.5}}).extensions.codes.keys() == {"eyes"}


@pytest.mark.parametrize("module", [sections, extensions], ids=["sections", "extensions"])
def test_every_field_has_a_docstring(module: ModuleType) -> None:
    for one in ast.parse(inspect.getsource(module)).body:
        if isinstance(one, ast.ClassDef):
            assert ast.get_docstring(one)
            pairs = zip(one.body, one.body[1:], strict=False)
            bare = [f.target.id for f, then in pairs if isinstance(f, ast.AnnAssign) and not is_text(then)]
            tables = {
                "patches",
                "copying",
                "warp",
                "mouth",
                "motion",
                "codes",
                "noise",
                "sound",
                "rollouts",
            }  # their classes have one
            assert set(bare) <= tables, one.name


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
