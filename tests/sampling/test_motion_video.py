"""Head motion and blinks of a real video, for another face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_data import cut
from test_sample import TINY, untrained
from torch import Tensor

from dheads.config import Config, override
from dheads.errors import DheadsError
from dheads.extensions.eyes import SHUT
from dheads.extensions.head_motion import FURTHEST, MotionClip, bounded
from dheads.extensions.network import ExtendedUNet
from dheads.faces.detection import LandmarkBackend
from dheads.faces.landmarks import load_backend
from dheads.media.writing import write_video
from dheads.sampling.jobs import Job
from dheads.sampling.motion_video import Repeated, motion_of
from dheads.sampling.talker import Talker
from dheads.weights.checkpoints import save_checkpoint

CODES = {"extensions": {"codes": {"lips": {}, "eyes": {}, "pose": {}}}, "alignment": {"smooth_frames": 250}}
MOVING = override(TINY, CODES)


@pytest.fixture(scope="module")
def backend() -> LandmarkBackend:
    return load_backend("mesh")


@pytest.fixture(scope="module")
def driver(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a real clip."""
    path = tmp_path_factory.mktemp("driver") / "driver.mp4"
    cut(shared / "data" / "hdtf" / "RD_Radio34_000.mp4", path, 50)
    return path


@pytest.fixture(scope="module")
def measured(driver: Path, backend: LandmarkBackend) -> dict[str, Tensor]:
    return motion_of(driver, MOVING, backend, None)


def moving_network(config: Config) -> ExtendedUNet:
    """An untrained network with a pose code whose head moves."""
    unet = untrained(config)
    assert unet.head_motion is not None
    for weight in unet.parameters():
        if not weight.any():  # residual blocks and the code's embedding begin at zero
            torch.nn.init.normal_(weight, std=0.1)
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(2, 100, 6, generator=generator).cumsum(1) * 0.01
    unet.head_motion.fit([MotionClip(str(k), walk[k], torch.randn(100, 384, generator=generator)) for k in range(2)])
    return unet


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    path = tmp_path_factory.mktemp("moving") / "moving.safetensors"
    save_checkpoint(path, moving_network(MOVING).state_dict(), MOVING, {})
    return Talker(str(path), torch.device("cpu"), progress=False)


def test_the_codes_of_a_real_clip(measured: dict[str, Tensor]) -> None:
    pose, eyes = measured["pose"], measured["eyes"]
    assert pose.shape == (50, 6)
    assert eyes.shape == (50, 1)
    assert (pose[0] == 0).all(), "it begins at the photo's pose"
    assert pose[1].abs().max() < 0.003
    assert 0.005 < pose[25:].std(0).max() < 0.2, "a man who speaks, seen in a crop from -1 to 1"
    assert pose[25:].median(0).values.abs().max() < 0.2
    assert pose.diff(dim=0).abs().max() < 0.08
    assert eyes.median() == 0
    assert eyes.min() > -1 or (eyes < SHUT).any()


def test_a_moved_picture_moves_the_head(driver: Path, backend: LandmarkBackend, examples: Path, tmp_path: Path) -> None:
    """A photo that is shifted to and fro: x follows, nothing else does, and eyes stay open."""
    photo = np.array(Image.open(examples / "face.jpg").convert("RGB").resize((256, 256)))
    shifts = np.rint(8 * np.sin(np.arange(40) / 4)).astype(int)
    write_video(tmp_path / "sway.mp4", [np.roll(photo, shift, axis=1) for shift in shifts], None)
    codes = motion_of(tmp_path / "sway.mp4", MOVING, backend, None)
    pose = codes["pose"][25:]
    assert np.corrcoef(pose[:, 2], shifts[25:])[0, 1] > 0.95
    others = pose.std(0)
    assert others[2] > 4 * others[[0, 1, 3, 4, 5]].max()
    assert codes["eyes"].min() > SHUT


def test_it_goes_on_back_and_forth() -> None:
    track = Repeated(torch.arange(4.0)[:, None])
    speech = torch.zeros(1, 1)
    shown = [track.window(frame, speech, 0, 0)[0, 0].item() for frame in range(10)]
    assert shown == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert track.window(0, speech, 0, 2)[:, 0].tolist() == [0, 0, 0, 1, 2]
    assert track.window(4, speech, 0, 2)[:, 0].tolist() == [2, 3, 2, 1, 0]
    assert Repeated(torch.ones(1, 2)).window(7, speech, 0, 1).tolist() == [[1, 1]] * 3


def test_what_is_no_video_of_a_face(backend: LandmarkBackend, examples: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "grey.mp4", [np.full((64, 64, 3), 128, np.uint8)] * 5, None)
    with pytest.raises(DheadsError, match=r"grey.mp4: a face is found in 0% of its frames; give a video that shows"):
        motion_of(tmp_path / "grey.mp4", MOVING, backend, None)
    with pytest.raises(DheadsError, match=r"face.jpg is a single picture, so no head moves in it; give a video"):
        motion_of(examples / "face.jpg", MOVING, backend, None)
    with pytest.raises(DheadsError, match=r"gone.mp4"):
        motion_of(tmp_path / "gone.mp4", MOVING, backend, None)


def poses(talker: Talker, job: Job) -> Tensor:
    """The pose that the network is given in each of 60 frames."""
    track = talker.scene(job).video.tracks["pose"]
    speech = torch.zeros(60, 384)
    return torch.stack([track.window(frame, speech, frame, 0)[0] for frame in range(60)])


def test_the_options_say_how_the_head_moves(
    talker: Talker, driver: Path, measured: dict[str, Tensor], examples: Path, tmp_path: Path
) -> None:
    def job(**options: object) -> Job:
        return Job(examples / "face.jpg", examples / "speech.wav", tmp_path / "x.mp4", seed=3, **options)  # type: ignore[arg-type]

    usual = poses(talker, job())
    assert usual.abs().max() > 0.01
    free = torch.cat([FURTHEST * torch.atanh(usual[:, :4] / FURTHEST), usual[:, 4:]], 1)
    torch.testing.assert_close(poses(talker, job(motion=0.5)), bounded(0.5 * free))
    for none in (job(motion=0.0), job(still=True), job(paste=True, still=True)):
        assert (poses(talker, none) == 0).all()
    assert torch.equal(poses(talker, job(paste=True)), usual)
    anchor = talker.config.extensions.motion.anchor
    assert talker.engine(job(still=True)).extensions.motion.anchor == anchor, "the pose keeps the head"
    assert poses(talker, job(paste=True, motion_from=driver)).abs().max() > 0.01
    driven = talker.scene(job(motion_from=driver, motion=2.0)).video.tracks
    assert set(driven) == {"pose", "eyes"}
    for name, scale in (("pose", 2.0), ("eyes", 1.0)):
        shown = torch.stack([driven[name].window(frame, torch.zeros(1, 384), 0, 0)[0] for frame in range(50)])
        told = scale * measured[name]
        torch.testing.assert_close(shown, bounded(told) if name == "pose" else told)


def test_frames_follow_the_motion(talker: Talker, examples: Path) -> None:
    sound = torch.randn(6_400, generator=torch.Generator().manual_seed(0)) * 0.1  # 10 frames
    moved, held = (list(talker.frames(examples / "face.jpg", sound, seed=3, motion=scale)) for scale in (2.0, 0.0))
    assert len(moved) == len(held) == 10
    assert not np.array_equal(moved[9], held[9])


@pytest.mark.parametrize("options", [{"motion": 1.0}, {"motion_from": Path("driver.mp4")}])
def test_weights_without_a_pose_code_say_so(options: dict[str, object], examples: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "old.safetensors", untrained(TINY).state_dict(), TINY, {})
    old = Talker(str(tmp_path / "old.safetensors"), torch.device("cpu"), progress=False)
    job = Job(examples / "face.jpg", examples / "speech.wav", tmp_path / "x.mp4", **options)  # type: ignore[arg-type]
    with pytest.raises(DheadsError, match=r"old.safetensors: was trained without extensions.codes.pose, so its head"):
        old.scene(job)
