"""Head motion by chance: where it begins, how far it goes, and that it follows the sound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dheads.config import override, preset
from dheads.extensions.head_motion import FURTHEST, HeadMotion, MotionClip, bounded
from dheads.extensions.network import ExtendedUNet
from dheads.extensions.pose import PoseCode
from dheads.sampling.lockstep import _SpeechWindow

DIMS, FRAMES = 4, 200  # of the speech, and of a clip
RANGE = torch.tensor([0.02, 0.06, 0.08, 0.05, 0.05, 0.04])


def speech(frames: int, seed: int) -> Tensor:
    return torch.randn(frames, DIMS, generator=torch.Generator().manual_seed(seed))


def swaying(seed: int, size: float = 1.0) -> Tensor:
    """(F, 6): a few slow waves with phases of their own; their middle is not zero."""
    phases = 2 * math.pi * torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))
    seconds = torch.arange(FRAMES)[:, None, None] / 25
    waves = torch.sin(2 * math.pi * torch.tensor([0.3, 0.5, 0.9])[:, None] * seconds + phases).sum(1)
    return size * RANGE * waves * math.sqrt(2 / 3) + 0.1


def clip(speaker: str, seed: int, size: float = 1.0) -> MotionClip:
    return MotionClip(speaker, swaying(seed, size), speech(FRAMES, seed))


def fitted(*more: MotionClip) -> HeadMotion:
    motion = HeadMotion(DIMS)
    motion.fit([clip(f"person {seed % 4}", seed) for seed in range(8)] + list(more))
    return motion


@pytest.fixture(scope="module")
def motion() -> HeadMotion:
    return fitted()


def poses(motion: HeadMotion, seed: int, sound: Tensor, scale: float = 1.0, chunk: int = 1000) -> Tensor:
    """(F, 6): the pose of every frame, with the speech in chunks."""
    track = motion.track(seed, scale)
    heard = _SpeechWindow(iter(sound.split(chunk)), track.reach + 2)
    rows = []
    for frame in range(len(sound)):
        near, at = heard.around(frame)
        rows.append(track.window(frame, near, at, 2)[2])
    return torch.stack(rows)


def test_it_begins_at_the_photos_pose_from_rest(motion: HeadMotion) -> None:
    for seed in range(5):
        track = poses(motion, seed, speech(50, seed)) / RANGE
        assert (track[0] == 0).all()
        assert track[1].abs().max() < 0.05
        assert track[25:].abs().max() > 0.3


def test_it_goes_as_far_as_the_clips_and_comes_back(motion: HeadMotion) -> None:
    track = poses(motion, 1, speech(1_500, 0))
    torch.testing.assert_close(track.std(0) / RANGE, torch.ones(6), rtol=0, atol=0.25)
    farthest = torch.cat([(swaying(seed) - 0.1).abs() for seed in range(8)]).amax(0)
    assert (track.abs().amax(0) < 2 * farthest).all(), "differences between pieces are small beside the pieces"
    assert (track.mean(0).abs() / RANGE).max() < 0.35, "the middle is the photo's pose"
    steps = track.diff(dim=0)
    assert (steps.diff(dim=0).std(0) / steps.std(0)).max() < 0.25, "no jerks where pieces are joined"
    true = swaying(0).diff(dim=0)
    torch.testing.assert_close(steps.std(0) / true.std(0), torch.ones(6), rtol=0, atol=0.4)


def unbounded(poses: Tensor) -> Tensor:
    """The inverse of `bounded`."""
    return torch.cat([FURTHEST * torch.atanh(poses[:, :4] / FURTHEST), poses[:, 4:]], 1)


def test_the_scale_multiplies_it(motion: HeadMotion) -> None:
    sound = speech(60, 0)
    usual = unbounded(poses(motion, 3, sound))
    torch.testing.assert_close(unbounded(poses(motion, 3, sound, 1.5)), 1.5 * usual)
    assert (poses(motion, 3, sound, 0) == 0).all()


def test_heads_stay_where_networks_are_trained(motion: HeadMotion) -> None:
    wild = poses(motion, 3, speech(400, 0), 20.0)
    assert 0.2 < wild[:, :4].abs().max() <= FURTHEST
    small = torch.full((1, 6), 0.02)
    torch.testing.assert_close(bounded(small), small, rtol=0.003, atol=0)


def test_a_seed_means_one_motion_however_the_speech_comes(motion: HeadMotion) -> None:
    sound = speech(200, 0)
    whole = poses(motion, 3, sound)
    for chunk in (1, 7, 64):
        assert torch.equal(poses(motion, 3, sound, chunk=chunk), whole)
    assert not torch.equal(poses(motion, 4, sound), whole)
    assert not torch.equal(poses(motion, 3, speech(200, 1)), whole), "the sound matters"
    track, heard = motion.track(3), _SpeechWindow(sound, HeadMotion.reach + 2)
    for frame in range(150):
        around = track.window(frame, *heard.around(frame), 2)
        assert torch.equal(around, whole[torch.arange(frame - 2, frame + 3).clamp(min=0)])


def test_nods_follow_the_sound_but_turns_to_a_side_do_not() -> None:
    """Clips whose pitch and yaw are mostly the sound of the same moment."""
    clips = []
    for seed in range(30):
        sound = speech(FRAMES, seed)
        loud = torch.nn.functional.avg_pool1d(sound[None, None, :, 0], 9, 1, 4)[0, 0][:, None]
        own = swaying(seed)
        own[:, 4:] += 2 * loud / loud.std() * RANGE[4:]
        clips.append(MotionClip(f"person {seed % 6}", own, sound))
    motion = HeadMotion(DIMS)
    motion.fit(clips)
    sound = speech(150, 99)
    loud = torch.nn.functional.avg_pool1d(sound[None, None, :, 0], 9, 1, 4)[0, 0]
    heard = motion.heard(sound, torch.arange(150))
    assert torch.corrcoef(torch.stack([loud, heard[:, 5]]))[0, 1] > 0.5
    assert (heard[:, [1, 2, 4]] == 0).all(), "a mirrored head would turn to the other side"
    motion.response[:, 6] = 0  # every piece at its own speed
    nodding = poses(motion, 0, sound)
    motion.response.zero_()
    added = unbounded(nodding) - unbounded(poses(motion, 0, sound))
    torch.testing.assert_close(added[25:], (heard[:, :6] * motion.spread)[25:], rtol=0, atol=1e-5)


def test_people_who_sit_still_are_left_out(motion: HeadMotion) -> None:
    quiet = [clip("quiet", seed, 0.1) for seed in range(50, 53)]
    both = fitted(*quiet)
    torch.testing.assert_close(both.spread, motion.spread)
    assert both.lengths.sum() == motion.lengths.sum() == 8 * FRAMES


def test_more_than_the_bank_holds() -> None:
    """200 clips of 200 frames for 12,000: everybody gives the longest that fit."""
    motion = HeadMotion(DIMS)
    motion.fit([clip(f"person {seed % 10}", seed) for seed in range(100)] + [clip("rare", 100)])
    assert 11_000 < motion.lengths.sum() <= 12_000
    assert (motion.lengths[motion.lengths > 0] >= 43).all()
    assert motion.chances.exp().mul(motion.lengths)[motion.lengths > 0].sum() == pytest.approx(11), "each person 1"


def test_without_clips_that_are_long_enough_the_head_stays() -> None:
    motion = HeadMotion(DIMS)
    motion.fit([MotionClip("a", swaying(0)[:20], speech(20, 0))])
    assert not motion.moves
    assert (poses(motion, 0, speech(30, 0)) == 0).all()


def test_it_is_kept_with_the_weights_in_200_kb() -> None:
    config = override(preset("tiny"), {"extensions": {"codes": {"pose": {}}}})
    motion = ExtendedUNet(config).head_motion
    assert motion is not None
    state = motion.state_dict()
    assert sum(2 * tensor.numel() for tensor in state.values()) < 200_000
    assert not list(motion.parameters()), "fitted, never trained"
    motion.fit([MotionClip(str(seed), swaying(seed), torch.randn(FRAMES, 384)) for seed in range(2)])
    copy = HeadMotion(384)
    copy.load_state_dict({name: tensor.half().float() for name, tensor in state.items()})
    sound = torch.randn(100, 384)
    track = PoseCode().track(copy, 3, 0.3)
    rows = torch.stack([track.window(frame, sound, frame, 0)[0] for frame in range(100)])
    torch.testing.assert_close(rows, poses(motion, 3, sound), rtol=0, atol=2e-3)
