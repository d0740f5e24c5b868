"""What the network is told: edge rules, order of channels, hidden mouths and copies, all in closed form."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dheads import conditioning
from dheads.conditioning import Condition, MotionBuffer
from dheads.config import Config, override, preset
from dheads.faces import alignment as faces

TINY = preset("tiny")


def told(**values: object) -> Config:
    return override(TINY, {"conditioning": values})


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
    return frame(0), Condition(frame(90), motion, torch.zeros(1, 5, 384))


def test_channels_are_x_t_then_motion_frames_then_the_identity() -> None:
    x_t, condition = numbered(2)
    given = conditioning.network_input(told(motion_frames=2), x_t, condition)
    assert given[0, :, 0, 0].tolist() == [1, 2, 3, 11, 12, 13, 21, 22, 23, 91, 92, 93]
    assert (given == given[:, :, :1, :1]).all()


def test_gray_motion_frames_take_one_channel_each() -> None:
    config = told(motion_frames=2, grayscale_motion=True)
    x_t, condition = numbered(2)
    given = conditioning.network_input(config, x_t, condition)
    luma = 0.299 * 1 + 0.587 * 2 + 0.114 * 3
    torch.testing.assert_close(given[0, :, 0, 0], torch.tensor([1.0, 2, 3, 10 + luma, 20 + luma, 91, 92, 93]))
    assert given.shape[1] == conditioning.input_channels(config)


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
    mask = conditioning.mouth_mask(alignment, size)
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


# --- build


def test_build_hides_mouths_of_motion_frames_only() -> None:
    config = told(hide_motion_mouth=True, motion_noise=0.0)
    identity, motion = torch.rand(2, 3, 32, 32), torch.rand(2, 2, 3, 32, 32)
    mask = conditioning.mouth_mask(config.alignment, 32)
    condition = conditioning.build(config, identity, motion, torch.zeros(2, 5, 384))
    assert torch.equal(condition.identity, identity)
    assert torch.equal(condition.motion_frames, motion * (1 - mask))
    assert condition.motion_noise is None


def test_build_adds_the_noise_it_tells_of() -> None:
    config = told(hide_motion_mouth=False, motion_noise=0.3)
    motion, noise = torch.rand(2, 2, 3, 32, 32), torch.randn(2, 2, 3, 32, 32)
    level = torch.tensor([0.1, 0.3])
    condition = conditioning.build(
        config, torch.zeros(2, 3, 32, 32), motion, torch.zeros(2, 5, 384), motion_noise=level, noise=noise
    )
    torch.testing.assert_close(condition.motion_frames[0], motion[0] + 0.1 * noise[0])
    torch.testing.assert_close(condition.motion_frames[1], motion[1] + 0.3 * noise[1])
    assert torch.equal(condition.motion_noise, level)


def test_noise_is_hidden_with_the_mouth() -> None:
    config = told(hide_motion_mouth=True, motion_noise=0.3)
    shape = (1, 2, 3, 32, 32)
    condition = conditioning.build(
        config,
        picture(0),
        torch.ones(shape),
        torch.zeros(1, 5, 384),
        motion_noise=torch.tensor([0.3]),
        noise=torch.randn(shape),
    )
    mask = conditioning.mouth_mask(config.alignment, 32)[0, 0] == 1
    assert (condition.motion_frames[..., mask] == 0).all()


def test_clean_motion_frames_are_told_to_be_clean() -> None:
    """What sampling does: no noise is added, and a network that knows of noise is told a level of 0."""
    config = told(hide_motion_mouth=False, motion_noise=0.3)
    motion = torch.rand(2, 2, 3, 32, 32)
    condition = conditioning.build(config, torch.zeros(2, 3, 32, 32), motion, torch.zeros(2, 5, 384))
    assert torch.equal(condition.motion_frames, motion)
    assert torch.equal(condition.motion_noise, torch.zeros(2))


def test_the_papers_conditioning_is_untouched() -> None:
    motion = torch.rand(1, 2, 3, 128, 128)
    condition = conditioning.build(preset("crema"), picture(0, 128), motion, torch.zeros(1, 5, 256))
    assert torch.equal(condition.motion_frames, motion)
    assert condition.mouth_mask is None
    assert condition.motion_noise is None


def test_without_audio() -> None:
    condition = Condition(
        picture(1), torch.ones(1, 2, 3, 32, 32), torch.ones(1, 5, 384), torch.ones(1, 5, 3), torch.ones(1)
    )
    silent = condition.without_audio()
    assert torch.equal(silent.audio_window, torch.zeros(1, 5, 384))
    assert torch.equal(silent.lip_window, torch.zeros(1, 5, 3))
    same = [field.name for field in dataclasses.fields(Condition) if field.name not in ("audio_window", "lip_window")]
    assert all(getattr(silent, name) is getattr(condition, name) for name in same)
    assert dataclasses.replace(condition, lip_window=None).without_audio().lip_window is None


# --- Copies


def copying(mask: torch.Tensor | None) -> Condition:
    motion = torch.stack([picture(0.1), picture(0.5)], dim=1)  # the last frame is 0.5
    return Condition(picture(-1), motion, torch.zeros(1, 5, 384), mouth_mask=mask)


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
    mask = conditioning.mouth_mask(TINY.alignment, 32)
    blended = conditioning.blend_copies(picture(0.25), logits(*gates), copying(mask))
    inside, beyond = mask.expand_as(blended) == 1, mask.expand_as(blended) == 0
    torch.testing.assert_close(blended[beyond], torch.full_like(blended[beyond], outside))
    torch.testing.assert_close(blended[inside], torch.full_like(blended[inside], 0.25))
    edge = ~inside & ~beyond
    torch.testing.assert_close(blended[edge], (outside + (0.25 - outside) * mask.expand_as(blended))[edge])


def test_gates_are_a_softmax_against_the_networks_own_zero() -> None:
    """g = softmax(0, a, b)."""
    own, last, identity = 0.25, 0.5, -1.0
    weights = torch.tensor([0, 0.7, -0.4]).softmax(0)
    blended = conditioning.blend_copies(picture(own), logits(0.7, -0.4), copying(None))
    torch.testing.assert_close(blended, picture(float(weights @ torch.tensor([own, last, identity]))))


def test_an_anchored_buffer_pulls_every_frame_towards_the_identity() -> None:
    buffer = conditioning.MotionBuffer(picture(1.0), 2, anchor=0.25)
    buffer.push(picture(0.0))
    assert [float(frame.mean()) for frame in buffer.stacked()[0]] == [1.0, 0.25]


def test_at_rest_frames_that_answer_one_another_come_to_rest() -> None:
    """Of what sways from frame to frame a third is left, and what stays comes through whole."""
    buffer = MotionBuffer(picture(0.5), 2)
    for k in range(40):
        buffer.push(picture(0.5 + 0.3 * (-1) ** k), rest=1.0)
    swing = buffer.stacked()[:, 1] - buffer.stacked()[:, 0]
    torch.testing.assert_close(swing.abs(), torch.full_like(swing, 0.2))
    for _ in range(20):
        buffer.push(picture(0.9), rest=1.0)
    torch.testing.assert_close(buffer.stacked()[:, 1], picture(0.9), rtol=0, atol=1e-5)
    empty = MotionBuffer(picture(0.5), 0)
    empty.push(picture(0.1), rest=1.0)
    assert empty.stacked().shape[1] == 0
