"""The recipe that turns a checkpoint into the packaged weights."""

from __future__ import annotations

from conftest import program

from dheads.config import override, preset


def test_sampling_settings_are_the_presets_and_the_rest_is_the_trainings() -> None:
    sampled = {
        "sampling": {"steps": 3, "solver": "ddim", "spacing": "logsnr"},
        "extensions": {
            "warp": {"favour": 1.5},
            "motion": {"sampling_noise": 0.1, "anchor": 0.2},
            "noise": {
                "shared": 0.3,
                "outer_shared": 0.4,
                "temperature": 0.45,
                "outer_temperature": 0.5,
                "pause_shared": 0.6,
                "warm_steps": 7,
            },
            "sound": {"guidance": 1.5, "room_noise": 0.01},
            "codes": {"lips": {"gain": 1.2}, "eyes": {"event_rate": 0.2, "gain": 1.1}},
        },
    }
    trained = override(preset("tiny"), {"extensions": {"motion": {"drift": 0.7}, "codes": {"eyes": {"weight": 0.9}}}})
    chosen = override(preset("tiny"), sampled, {"optimisation": {"seed": 9}, "sampling": {"steps": 2}})
    trained = override(trained, {"sampling": {"steps": 3}})
    packed = program("recipes/pack.py").with_sampling_of(chosen, trained)
    assert packed == override(trained, sampled)
