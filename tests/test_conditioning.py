"""What the network is given: edge rules, order of channels, hidden mouths and copies, all in closed form."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dheads import conditioning
from dheads.conditioning import Condition, Cues, MotionBuffer
from dheads.config import Config, override, preset
from dheads.extensions.copying import blend_copies, mouth_mask
from dheads.extensions.guidance import silenced
from dheads.extensions.motion import MotionCondition, anchored, condition_with, rested
from dheads.faces import alignment as faces

TINY = preset("tiny")


def given(**values: object) -> Config:
    return override(TINY, {"conditioning": values})


def moving(**values: object) -> Config:
    return override(TINY, {"extensions": {"motion": values}})


def mask_of(config: Config, size: int = 32) -> torch.Tensor:
    return mouth_mask(config.alignment, size, torch.device("cpu"))


def heard(batch: int = 1, dim: int = 384) -> Cues:
    return Cues(torch.zeros(batch, 5, dim))


def picture(value: float, size: int = 32) -> torch.Tensor:
    return torch.full((1, 3, size, size), float(value))


# --- The audio window


def test_the_window_repeats_the_ends() -> None:
    speech = torch.arange(5.0)[:, None]  # (F, 1): embedding k is k
    assert conditioning.window(speech, 0, 2)[:, 0].tolist() == [0, 0, 0, 1, 2]
    assert conditioning.window(speech, 1, 2)[:, 0].tolist() == [0, 0, 1, 2, 3]
    assert conditioning.window(speech, 2, 2)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert conditioning.window(speech, 4, 2)[:, 0].tolist() == [2, 3, 4, 4, 4]


def test_the_window_of_several_frames_and_of_the_shortest_recording() -> None:
    speech = torch.arange(6.0).reshape(3, 2)
    frames = torch.tensor([2, 0])
    assert torch.equal(
        conditioning.window(speech, frames, 1), torch.stack([conditioning.window(speech, k, 1) for k in (2, 0)])
    )
    assert conditioning.window(speech[:1], 0, 2).tolist() == [[0, 1]] * 5
    assert conditioning.window(speech, 1, 0).tolist() == [[2, 3]]


# --- Motion frames


def test_frames_before_the_first_are_the_identity() -> None:
    assert conditioning.motion_indices(0, 2) == [None, None]
    assert conditioning.motion_indices(1, 2) == [None, 0]
    assert conditioning.motion_indices(2, 2) == [0, 1]
    assert conditioning.motion_indices(7, 3) == [4, 5, 6]
    assert conditioning.motion_indices(7, 0) == []


def test_the_buffer_holds_what_the_indices_say() -> None:
    """Training reads `motion_indices`, sampling the buffer: for every frame both mean the same pictures."""
    identity, frames = picture(-1), [picture(k / 10) for k in range(5)]
    for count in (1, 2, 3):
        buffer = MotionBuffer(identity, count)
        for k, frame in enumerate(frames):
            wanted = [identity if j is None else frames[j] for j in conditioning.motion_indices(k, count)]
            assert torch.equal(buffer.stacked(), torch.stack(wanted, dim=1))
            buffer.push(frame)


def test_a_model_without_motion_frames_has_an_empty_buffer() -> None:
    buffer = MotionBuffer(picture(0), 0)
    buffer.push(picture(1))
    assert buffer.stacked().shape == (1, 0, 3, 32, 32)


# --- The input's channels


def numbered(frames: int) -> tuple[torch.Tensor, Condition]:
    """x_t has the values 1, 2, 3 on its channels, motion frame i 10 i + 1, 2, 3, the identity 91, 92, 93."""

    def frame(base: float) -> torch.Tensor:
        return (base + torch.tensor([1.0, 2, 3]))[None, :, None, None].expand(1, 3, 4, 4)

    motion = torch.stack([frame(10 * (i + 1)) for i in range(frames)], dim=1)
    return frame(0), Condition(frame(90), motion, heard())


def test_channels_are_x_t_then_motion_frames_then_the_identity() -> None:
    x_t, condition = numbered(2)
    channels = conditioning.network_input(given(motion_frames=2), x_t, condition)
    assert channels[0, :, 0, 0].tolist() == [1, 2, 3, 11, 12, 13, 21, 22, 23, 91, 92, 93]
    assert (channels == channels[:, :, :1, :1]).all()


def test_gray_motion_frames_take_one_channel_each() -> None:
    config = given(motion_frames=2, grayscale_motion=True)
    x_t, condition = numbered(2)
    channels = conditioning.network_input(config, x_t, condition)
    luma = 0.299 * 1 + 0.587 * 2 + 0.114 * 3
    torch.testing.assert_close(channels[0, :, 0, 0], torch.tensor([1.0, 2, 3, 10 + luma, 20 + luma, 91, 92, 93]))
    assert channels.shape[1] == conditioning.input_channels(config)


def test_gray_is_luma_and_keeps_gray() -> None:
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2)  # red, green, blue
    assert conditioning.grayscale(colours)[:, 0, 0, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])
    torch.testing.assert_close(conditioning.grayscale(picture(-0.7)), torch.full((1, 1, 32, 32), -0.7))


@pytest.mark.parametrize(("frames", "gray", "channels"), [(2, False, 12), (2, True, 8), (0, False, 6), (3, True, 9)])
def test_number_of_channels(frames: int, gray: bool, channels: int) -> None:
    changes = {"motion_frames": frames, "grayscale_motion": gray}
    assert conditioning.input_channels(override(preset("crema"), {"conditioning": changes})) == channels


# --- The mouth


@pytest.mark.parametrize("name", ["tiny", "small", "crema"])
@pytest.mark.parametrize("size", [32, 96, 128])
def test_the_mask_covers_the_mean_faces_mouth_and_not_its_eyes(name: str, size: int) -> None:
    alignment = preset(name).alignment
    mask = mouth_mask(alignment, size, torch.device("cpu"))
    assert mask.shape == (1, 1, size, size)
    assert mask.min() == 0
    assert mask.max() == 1
    points = faces.mean_face(alignment, size).round().astype(int)
    x, y = points[faces.MOUTH].T
    assert (mask[0, 0, y, x] == 1).all()
    x, y = points[[8]].T  # the chin
    assert (mask[0, 0, y.clip(0, size - 1), x] > 0.5).all()
    x, y = points[36:48].T
    assert (mask[0, 0, y, x] == 0).all()
    torch.testing.assert_close(mask, mask.flip(3), msg="a face is as wide on the left as on the right")


# --- Motion frames that are altered


def test_mouths_of_motion_frames_alone_are_blanked() -> None:
    config = moving(hide_mouth=True, noise=0.0)
    identity, motion = torch.rand(2, 3, 32, 32), torch.rand(2, 2, 3, 32, 32)
    mask = mask_of(config)
    condition = condition_with(config, identity, motion, heard(2))
    assert torch.equal(condition.identity, identity)
    assert torch.equal(condition.motion_frames, motion * (1 - mask))
    assert condition.motion_noise is None


def test_noise_has_the_level_that_is_given() -> None:
    config = moving(hide_mouth=False, noise=0.3)
    motion, noise = torch.rand(2, 2, 3, 32, 32), torch.randn(2, 2, 3, 32, 32)
    level = torch.tensor([0.1, 0.3])
    condition = condition_with(config, torch.zeros(2, 3, 32, 32), motion, heard(2), level, noise)
    torch.testing.assert_close(condition.motion_frames[0], motion[0] + 0.1 * noise[0])
    torch.testing.assert_close(condition.motion_frames[1], motion[1] + 0.3 * noise[1])
    assert torch.equal(condition.motion_noise, level)


def test_noise_is_hidden_with_the_mouth() -> None:
    config = moving(hide_mouth=True, noise=0.3)
    shape = (1, 2, 3, 32, 32)
    level, eps = torch.tensor([0.3]), torch.randn(shape)
    condition = condition_with(config, picture(0), torch.ones(shape), heard(), level, eps)
    mask = mask_of(config)[0, 0] == 1
    assert (condition.motion_frames[..., mask] == 0).all()


def test_clean_motion_frames_have_a_level_of_zero() -> None:
    """As in sampling: no noise is added, and a network that is given a level is given 0."""
    config = moving(hide_mouth=False, noise=0.3)
    motion = torch.rand(2, 2, 3, 32, 32)
    condition = condition_with(config, torch.zeros(2, 3, 32, 32), motion, heard(2))
    assert torch.equal(condition.motion_frames, motion)
    assert torch.equal(condition.motion_noise, torch.zeros(2))


def test_the_papers_motion_frames_are_untouched() -> None:
    motion = torch.rand(1, 2, 3, 128, 128)
    condition = condition_with(preset("crema"), picture(0, 128), motion, heard(1, 256))
    assert torch.equal(condition.motion_frames, motion)
    assert condition.motion_noise is None


def test_without_sound() -> None:
    """Embeddings and the codes that follow from the sound are zero; the eyes blink on."""
    cues = Cues(torch.ones(2, 5, 384), {"lips": torch.ones(2, 5, 3), "eyes": torch.ones(2, 5, 1)})
    condition = MotionCondition(picture(1), torch.ones(2, 2, 3, 32, 32), cues, torch.ones(2))
    silent = silenced(condition, torch.tensor([0, 1]))
    assert torch.equal(silent.cues.audio_window[0], torch.zeros(5, 384))
    assert torch.equal(silent.cues.codes["lips"][0], torch.zeros(5, 3))
    assert torch.equal(silent.cues.audio_window[1], torch.ones(5, 384))
    assert torch.equal(silent.cues.codes["lips"][1], torch.ones(5, 3))
    assert silent.cues.codes["eyes"] is cues.codes["eyes"]
    same = [field.name for field in dataclasses.fields(MotionCondition) if field.name != "cues"]
    assert all(getattr(silent, name) is getattr(condition, name) for name in same)


def test_cues_change_slice_and_join_alike() -> None:
    cues = Cues(torch.arange(6.0).view(2, 1, 3), {"eyes": torch.arange(2.0).view(2, 1, 1)})
    doubled = cues.map(lambda value: 2 * value)
    assert torch.equal(doubled.audio_window, 2 * cues.audio_window)
    assert torch.equal(doubled.codes["eyes"], 2 * cues.codes["eyes"])
    assert cues[1:].codes["eyes"].tolist() == [[[1.0]]]
    joined = Cues.cat([cues[1:], cues[:1]])
    assert joined.audio_window[:, 0, 0].tolist() == [3.0, 0.0]
    assert joined.codes["eyes"][:, 0, 0].tolist() == [1.0, 0.0]


# --- Copies


def copying() -> Condition:
    motion = torch.stack([picture(0.1), picture(0.5)], dim=1)  # the last frame is 0.5
    return Condition(picture(-1), motion, heard())


def logits(a: float, b: float) -> torch.Tensor:
    return torch.tensor([float(a), b])[None, :, None, None].expand(1, 2, 32, 32)


@pytest.mark.parametrize(
    ("gates", "outside"),
    [
        ((50, -50), 0.5),
        ((-50, 50), -1.0),
        ((-50, -50), 0.25),
        ((50, 50), (0.5 - 1) / 2),
        ((0, 0), (0.25 + 0.5 - 1) / 3),
    ],
)
def test_gates_choose_outside_the_mouth(gates: tuple[float, float], outside: float) -> None:
    mask = mask_of(TINY)
    blended = blend_copies(picture(0.25), logits(*gates), copying(), mask)
    inside, beyond = mask.expand_as(blended) == 1, mask.expand_as(blended) == 0
    torch.testing.assert_close(blended[beyond], torch.full_like(blended[beyond], outside))
    torch.testing.assert_close(blended[inside], torch.full_like(blended[inside], 0.25))
    edge = ~inside & ~beyond
    torch.testing.assert_close(blended[edge], (outside + (0.25 - outside) * mask.expand_as(blended))[edge])


def test_gates_are_a_softmax_against_the_networks_own_zero() -> None:
    """g = softmax(0, a, b)."""
    own, last, identity = 0.25, 0.5, -1.0
    weights = torch.tensor([0, 0.7, -0.4]).softmax(0)
    blended = blend_copies(picture(own), logits(0.7, -0.4), copying(), torch.zeros(1, 1, 32, 32))
    torch.testing.assert_close(blended, picture(float(weights @ torch.tensor([own, last, identity]))))


def test_an_anchored_frame_has_its_share_of_the_identity() -> None:
    config = moving(anchor=0.25)
    torch.testing.assert_close(anchored(config, picture(0.0), picture(1.0), None), picture(0.25))


def test_at_rest_frames_that_answer_one_another_come_to_rest() -> None:
    """Of what sways from frame to frame a third is left, and what stays comes through whole."""
    buffer = conditioning.MotionBuffer(picture(0.5), 2)
    for k in range(40):
        buffer.push(rested(picture(0.5 + 0.3 * (-1) ** k), buffer.stacked(), 1.0))
    swing = buffer.stacked()[:, 1] - buffer.stacked()[:, 0]
    torch.testing.assert_close(swing.abs(), torch.full_like(swing, 0.2))
    for _ in range(20):
        buffer.push(rested(picture(0.9), buffer.stacked(), 1.0))
    torch.testing.assert_close(buffer.stacked()[:, 1], picture(0.9), rtol=0, atol=1e-5)
    none = torch.empty(1, 0, 3, 32, 32)
    assert torch.equal(rested(picture(0.1), none, 1.0), picture(0.1))
