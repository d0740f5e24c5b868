"""Configurations: presets, strict reading, and parts that do not fit together."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from dheads.config import Config, from_dict, override, preset, to_dict, to_toml
from dheads.errors import DheadsError


@pytest.mark.parametrize("name", ["crema", "lrw", "small", "tiny"])
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", ["crema", "lrw", "small", "tiny"])
def test_a_configuration_written_as_toml_is_read_back(name: str) -> None:
    config = preset(name)
    assert from_dict(tomllib.loads(to_toml(config))) == config


def test_any_text_and_any_number_come_back_from_toml() -> None:
    config = override(preset("tiny"), {"name": 'a "name"\n\t\\ \x07 ü 😀', "training": {"grad_clip": math.inf}})
    assert from_dict(tomllib.loads(to_toml(config))) == config


def numbers() -> Iterator[tuple[str, str, tuple[float, float] | None]]:
    """Section, name and bounds of every field that is a number, or several."""
    for section in dataclasses.fields(Config):
        if section.name != "name":
            for one in dataclasses.fields(section.default_factory):
                if re.search(r"\b(int|float)\b", one.type) and "Literal" not in one.type:
                    yield section.name, one.name, one.metadata.get("bounds")


@pytest.mark.parametrize(("section", "name", "bounds"), list(numbers()))
def test_every_number_has_bounds(section: str, name: str, bounds: tuple[float, float] | None) -> None:
    assert bounds is not None, "a field without bounds"
    value = getattr(getattr(preset("tiny"), section), name)
    beyond = [bounds[0] - 1, math.nan, *([] if math.isinf(bounds[1]) else [bounds[1] + 1])]
    for number in beyond:
        if isinstance(value, int) or (isinstance(value, tuple) and value and isinstance(value[0], int)):
            if math.isnan(number):
                continue
            number = int(number)
        with pytest.raises(DheadsError, match=rf"{section}\.{name} (is|must be)"):
            override(preset("tiny"), {section: {name: [number] if isinstance(value, tuple) else number}})


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(DheadsError, match=r"sampling\.steps is 4, but diffusion\.num_steps only 3"):
        override(preset("tiny"), {"diffusion": {"num_steps": 3}})


def test_the_papers_presets_are_the_paper() -> None:
    for name, grayscale in (("crema", False), ("lrw", True)):
        config = preset(name)
        net, told, training = config.model, config.conditioning, config.training
        assert (net.image_size, net.model_channels, net.channel_mult, net.num_res_blocks) == (128, 256, (1, 2, 3), 2)
        assert (net.dropout, net.learned_variance, net.patch_size, net.copy_gates) == (0.1, True, 1, False)
        assert (told.motion_frames, told.audio_context, told.speech_dim) == (2, 2, 256)
        assert told.grayscale_motion is grayscale
        assert (told.motion_noise, told.hide_motion_mouth, told.lip_dims) == (0, False, 0)
        assert (config.diffusion.num_steps, config.diffusion.prediction) == (1000, "eps")
        assert (training.batch_size, training.learning_rate, training.lr_schedule) == (10, 5e-5, "paper")
        assert (training.lambda_vlb, training.lambda_lip, training.snr_clip) == (1e-4, 0.2, None)
        assert (training.augment, training.motion_drift, training.audio_dropout) == (False, 0, 0)


def test_override_keeps_the_rest() -> None:
    changed = override(preset("tiny"), {"training": {"steps": 7}, "name": "mine"})
    assert changed.training.steps == 7
    assert changed.name == "mine"
    assert changed.model == preset("tiny").model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"step": 3}}, "unknown key training.step; did you mean steps?"),
        ({"trainning": {}}, "did you mean training?"),
        ({"training": {"steps": "many"}}, "training.steps must be int, not 'many'"),
        ({"training": {"augment": 1}}, "training.augment must be bool"),
        ({"training": 3}, "training must be a table"),
        ({"diffusion": {"prediction": "score"}}, "diffusion.prediction is 'score', but must be one of"),
        ({"conditioning": {"lip_dims": 2}}, "conditioning.lip_dims is 2"),
        ({"model": {"image_size": 33}}, "model.image_size is 33, but must be a multiple of 2"),
        ({"model": {"patch_size": 0}}, "model.patch_size is 0, but must be 1 to 64"),
        ({"model": {"channel_mult": []}}, "model.channel_mult must have 1 to 8 numbers"),
        ({"model": {"channel_mult": [1, 0]}}, "model.channel_mult is 0, but must be 1 to 64"),
        ({"model": {"detail_channels": 8}}, "detail_channels needs an even model.patch_size, not 1"),
        ({"conditioning": {"motion_frames": 0}}, "copy_gates needs conditioning.motion_frames"),
        ({"preparation": {"speech_tempos": [1, 9]}}, "preparation.speech_tempos is 9, but must be 0.5 to 2"),
        ({"training": {"snr_clip": None}}, "copy_gates needs training.snr_clip"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DheadsError) as error:
        override(preset("tiny"), changes)
    assert words in str(error.value)


def test_unknown_presets_list_the_known() -> None:
    with pytest.raises(DheadsError, match="crema, lrw, small, tiny"):
        preset("huge")
