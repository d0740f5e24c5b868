"""The photo moved by a pose, and the pose code's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dheads.conditioning import Cues
from dheads.config import Config, override, preset
from dheads.denoiser import training_schedule
from dheads.errors import DheadsError
from dheads.extensions.copying import mouth_mask, pixel_grid
from dheads.extensions.head_motion import HeadMotion
from dheads.extensions.motion import anchored, condition_with
from dheads.extensions.network import ExtendedOutput, ExtendedUNet
from dheads.extensions.pose import composed, done, reframed, relative, undone
from dheads.extensions.warp import (
    MovedPhoto,
    blended,
    flowing,
    landmark_error,
    moved_photo,
    sampled,
    shares,
)

SIZE = 32
CPU = torch.device("cpu")


def config_of(**extensions: object) -> Config:
    """tiny with the photo moved."""
    warp = {"copying": {"gates": False}, "warp": {"flow": True}, "codes": {"pose": {"context": 0}}}
    return override(preset("tiny"), {"extensions": warp}, {"extensions": extensions})


def poses(count: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn((count, 6), generator=torch.Generator().manual_seed(seed))


def smooth_picture(seed: int = 0) -> Tensor:
    """(1, 3, 32, 32), so smooth that resampling it loses little."""
    coarse = torch.rand((1, 3, 5, 5), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True).clamp(-1, 1)


# --- Poses


def test_done_and_undone_are_inverse() -> None:
    points = torch.rand((7, 11, 2), generator=torch.Generator().manual_seed(1)) * 2 - 1
    pose = poses(7)[:, None]
    torch.testing.assert_close(undone(pose, done(pose, points)), points)
    a = torch.exp(pose[..., 0] + 1j * pose[..., 1])
    z = a * torch.view_as_complex(points) + torch.complex(pose[..., 2], pose[..., 3])
    torch.testing.assert_close(done(pose, points), torch.view_as_real(z))


def test_a_relative_pose_leads_from_the_photos_head_to_the_frames() -> None:
    """T = S_frame S_photo^-1: a point of the head in the photo goes to the same point of the head in the frame."""
    frame, photo = poses(7), poses(7, 1)
    face = torch.rand((7, 11, 2), generator=torch.Generator().manual_seed(2)) * 2 - 1
    pose = relative(frame, photo)
    torch.testing.assert_close(done(pose[:, None], done(photo[:, None], face)), done(frame[:, None], face))
    torch.testing.assert_close(pose[:, 4:], frame[:, 4:] - photo[:, 4:])
    torch.testing.assert_close(relative(photo, photo), torch.zeros(7, 6), rtol=0, atol=1e-6)


def test_one_similarity_after_the_other() -> None:
    outer, inner = poses(7), poses(7, 1)
    points = torch.rand((7, 11, 2), generator=torch.Generator().manual_seed(2))
    both = composed(outer, inner)[:, None]
    torch.testing.assert_close(done(both, points), done(outer[:, None], done(inner[:, None], points)))


@pytest.mark.parametrize("mirror", [False, True])
def test_a_reframed_pose_does_the_same_in_the_new_frame(mirror: bool) -> None:
    pose, frame = poses(7), poses(7, 1)
    mirrored = torch.full((7,), mirror)
    points = torch.rand((7, 11, 2), generator=torch.Generator().manual_seed(2)) * 2 - 1  # in the new frame

    def old(new: Tensor) -> Tensor:
        return done(frame[:, None], new * torch.tensor([-1.0 if mirror else 1.0, 1.0]))

    changed = reframed(pose, frame, mirrored)
    torch.testing.assert_close(old(done(changed[:, None], points)), done(pose[:, None], old(points)))
    torch.testing.assert_close(changed[:, 4], -pose[:, 4] if mirror else pose[:, 4])
    torch.testing.assert_close(changed[:, 5], pose[:, 5])


# --- The photo moved


def test_without_a_pose_the_photo_stays_as_it_is() -> None:
    config, photo = config_of(), smooth_picture()
    moved = moved_photo(config, photo, torch.zeros(1, 6))
    torch.testing.assert_close(moved.picture, photo, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.grid[0], pixel_grid(SIZE, CPU))
    torch.testing.assert_close(moved.mask, mouth_mask(config.alignment, SIZE, CPU), rtol=0, atol=1e-5)


def test_a_shift_of_whole_pixels_moves_pixels_and_mask() -> None:
    config, photo = config_of(), smooth_picture()
    pose = torch.zeros(1, 6)
    pose[:, 2], pose[:, 3] = 2 * 3 / SIZE, -2 * 5 / SIZE  # 3 px to the right, 5 up
    moved = moved_photo(config, photo, pose)
    torch.testing.assert_close(moved.picture[..., :-5, 3:], photo[..., 5:, :-3], rtol=0, atol=1e-4)
    mask = mouth_mask(config.alignment, SIZE, CPU)
    torch.testing.assert_close(moved.mask[..., :-5, 3:], mask[..., 5:, :-3], rtol=0, atol=1e-4)


def test_a_turned_photo_shows_each_point_where_the_pose_takes_it() -> None:
    photo, pose = smooth_picture(), torch.tensor([[0.1, 0.3, 0.1, -0.05, 0.0, 0.0]])
    points = torch.tensor([[[0.2, 0.3], [-0.4, 0.1], [0.0, -0.5]]])
    moved = moved_photo(config_of(), photo, pose).picture
    there = sampled(moved, done(pose[:, None], points)[:, None])
    torch.testing.assert_close(there, sampled(photo, points[:, None]), rtol=0, atol=0.03)


def test_a_flow_of_pixels_is_added_to_the_grid() -> None:
    flow = torch.tensor([2.0, -1.0])[None, :, None, None].expand(1, 2, 8, 8)
    grid = flowing(pixel_grid(SIZE, CPU)[None], flow, torch.ones(1, 1, SIZE, SIZE))
    photo = smooth_picture()
    torch.testing.assert_close(sampled(photo, grid)[..., 1:, :-2], photo[..., :-1, 2:], rtol=0, atol=1e-4)


def test_the_landmark_error_is_the_mean_squared_distance_in_pixels() -> None:
    points = torch.tensor([[[0.1, 0.2], [-0.3, 0.4]]])
    grid = pixel_grid(SIZE, CPU)[None] + torch.tensor([3.0, 4.0]) * 2 / SIZE
    torch.testing.assert_close(landmark_error(grid, points, points), torch.tensor([25.0]))
    assert landmark_error(pixel_grid(SIZE, CPU)[None], points, points) < 1e-6


def masked(mask: float, favour: float = 0.0) -> MovedPhoto:
    """A photo of 4 px with that mask and favour throughout."""
    one = torch.ones(1, 1, 4, 4)
    return MovedPhoto(torch.zeros(1, 4, 4, 2), torch.zeros(1, 3, 4, 4), mask * one, favour * one, one)


def test_the_photo_is_favoured_in_sampling_but_around_moved_eyes() -> None:
    config, pose = config_of(), torch.zeros(1, 6)
    pose[:, 2] = 2 * 6 / SIZE  # 6 px to the right
    photo = smooth_picture()
    assert (moved_photo(config, photo, pose).favour == 0).all(), "as in training"
    in_place, favour = moved_photo(config, photo, pose, favour=2.5).favour[0]
    eye_y, middle = round(config.alignment.eye_y * SIZE), SIZE // 2 + 6
    apart = round(config.alignment.eye_distance / 2 * SIZE)
    assert favour[eye_y, middle - apart] == favour[eye_y, middle + apart] == 0
    half = moved_photo(config, photo, pose, favour=2.5, blink=torch.tensor([0.5])).favour[0, 1]
    assert half[eye_y, middle - apart] == 1.25, "eyes that do not blink are the photo's, too"
    assert (moved_photo(config, photo, pose).bends == 1).all(), "as in training"
    bends = moved_photo(config, photo, pose, favour=2.5).bends[0, 0]
    assert bends[eye_y, middle] == 1
    assert (bends[[0, -1], [0, -1]] == 0).all(), "beyond the head there is no flow"
    assert favour[eye_y, middle] > 0, "the bridge of the nose"
    assert favour[eye_y + 4, middle] == 2.5, "the nose"
    assert (favour[0] > 30).all(), "beyond the face nothing is the network's own"
    assert (favour[-1, [0, -1]] > 30).all()
    middle = SIZE // 2
    less = favour - in_place
    assert less[middle, 2:-2].min() > 10, "where the head is in the photo it is never taken in place"
    assert (less[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all(), "the corners are background"


# --- Frames larger than the network's


def test_shares_are_a_softmax_and_around_the_mouth_all_is_the_networks_own() -> None:
    gates = torch.tensor([0.7, -0.4])[None, :, None, None].expand(1, 2, 4, 4)
    outside = shares(gates, masked(0.0))
    torch.testing.assert_close(outside[0, :, 0, 0], torch.tensor([0.0, 0.7, -0.4]).softmax(0))
    favoured = shares(gates, masked(0.0, favour=2.5))
    torch.testing.assert_close(favoured[0, :, 0, 0], torch.tensor([0.0, 3.2, 2.1]).softmax(0))
    inside = shares(gates, masked(1.0, favour=2.5))[0, :, 0, 0]
    torch.testing.assert_close(inside, torch.tensor([1.0, 0.0, 0.0]))
    parts = [torch.full((1, 3, 4, 4), value) for value in (1.0, 10.0, 100.0)]
    expected = float(torch.tensor([1.0, 10.0, 100.0]) @ outside[0, :, 0, 0])
    torch.testing.assert_close(blended(*parts, outside), torch.full((1, 3, 4, 4), expected))


# --- In the network


def cues_of(config: Config, pose: Tensor) -> Cues:
    count, cond = len(pose), config.conditioning
    tables = config.extensions.codes
    codes = {"lips": torch.zeros(count, 5, 3), "eyes": torch.zeros(count, 5, 1), "pose": pose[:, None]}
    assert tables["pose"].context == 0
    return Cues(torch.zeros(count, 2 * cond.audio_context + 1, cond.speech_dim), codes)


def test_a_new_networks_frame_is_the_photo_moved_in_its_share() -> None:
    """Flow and gates begin at zero: a third is the photo in place, a third the photo moved; by the mouth none."""
    config, photo = config_of(patches={"size": 2}), smooth_picture().expand(2, -1, -1, -1)
    pose = torch.zeros(2, 6)
    pose[1, 2] = 0.25
    unet = ExtendedUNet(config).eval()
    condition = condition_with(config, photo, photo[:, None].repeat(1, 2, 1, 1, 1), cues_of(config, pose))
    x_t, t = torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        output = unet(x_t, t, condition)
        x_0 = unet.compose(training_schedule(config.diffusion), torch.zeros_like(x_t), x_t, t, output, condition)
    assert isinstance(output, ExtendedOutput)
    assert output.flow is not None
    assert output.flow.shape == (2, 2, SIZE // 2, SIZE // 2)
    assert condition.photo is not None
    outside, moved = condition.photo.mask.expand_as(x_0) == 0, condition.photo.picture
    torch.testing.assert_close(x_0[outside], ((photo + moved) / 3)[outside])
    assert not x_0[condition.photo.mask.expand_as(x_0) == 1].any()


def test_motion_frames_lose_the_mouth_where_the_pose_says_it_is_and_are_anchored_to_the_photo_moved() -> None:
    config, photo = config_of(motion={"anchor": 0.5}), smooth_picture()
    pose = torch.zeros(1, 6)
    pose[:, 3] = 2 * 4 / SIZE
    condition = condition_with(config, photo, torch.ones(1, 2, 3, SIZE, SIZE), cues_of(config, pose))
    mask = mouth_mask(config.alignment, SIZE, CPU)
    torch.testing.assert_close(
        condition.motion_frames[0, 0, :, 4:], 1 - mask[0, :, :-4].expand(3, -1, -1), atol=1e-4, rtol=0
    )
    anchor = anchored(config, torch.zeros_like(photo), photo, pose)
    torch.testing.assert_close(anchor[..., 4:, :], photo[..., :-4, :] / 2, rtol=0, atol=1e-4)


def test_weights_without_it_go_on_with_it() -> None:
    """What is new begins without effect, so that only the meaning of the gates is another."""
    motion = {"motion": {"hide_mouth": False}}
    with_warp = config_of(**motion)
    without = {"warp": {"flow": False}, "codes": {"pose": None}, "copying": {"gates": True}}
    torch.manual_seed(0)
    old, new = ExtendedUNet(override(with_warp, {"extensions": without})).eval(), ExtendedUNet(with_warp).eval()
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    new.start_from(old.state_dict())
    photo, motion_frames = smooth_picture(), torch.rand(1, 2, 3, SIZE, SIZE)
    cues = cues_of(with_warp, poses(1))
    x_t, t = torch.randn(1, 3, SIZE, SIZE), torch.tensor([400])
    ours = new(x_t, t, condition_with(with_warp, photo, motion_frames, cues))
    known = Cues(cues.audio_window, {name: cues.codes[name] for name in ("lips", "eyes")})
    theirs = old(x_t, t, condition_with(old.config, photo, motion_frames, known))
    torch.testing.assert_close(ours.prediction, theirs.prediction)
    torch.testing.assert_close(ours.gates, theirs.gates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": {"pose": None}}, "extensions.warp.flow needs a table extensions.codes.pose"),
        ({"copying": {"gates": True}}, "takes the place of extensions.copying.gates"),
        ({"snr_clip": None}, "extensions.warp.flow needs extensions.snr_clip"),
    ],
)
def test_what_the_warp_needs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DheadsError, match=message):
        config_of(**changes)


def test_a_still_head_keeps_to_the_photo() -> None:
    track = HeadMotion(8).track(0, 0.0)
    assert torch.equal(track.window(7, torch.zeros(1, 8), 0, 2), torch.zeros(5, 6))
