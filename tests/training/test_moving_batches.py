"""Batches where the photo is moved: pictures, poses and landmarks of an example agree.

The clips are synthetic: one picture moved by a similarity in each frame, with the mean face's landmarks moved alike.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dheads.config import Config, override, preset, to_toml
from dheads.dataset.dataset import Dataset, dataset_info
from dheads.dataset.manifest import Clip, write_clips
from dheads.extensions.copying import pixel_grid
from dheads.extensions.pose import done, undone
from dheads.extensions.warp import landmark_error, moved_photo, sampled
from dheads.faces.alignment import mean_face
from dheads.media.pixels import to_uint8
from dheads.media.writing import write_clip
from dheads.training.batches import Batch, Batches

SIZE, FRAMES = 64, 12
CONFIG = override(
    preset("tiny"),
    {
        "network": {"image_size": SIZE},
        "conditioning": {"speech_dim": 8},
        "optimisation": {"batch_size": 24},
        "extensions": {
            "copying": {"gates": False},
            "warp": {"flow": True},
            "motion": {"anchor": 1.0, "start_share": 0.25},
            "codes": {"pose": {"context": 0}},
            "rollouts": {"share": 0.5, "start": 0.5},
            "examples": {"balance": "clips", "augment": False, "other_clip_share": 0.3},
        },
    },
)
AUGMENTED = override(CONFIG, {"extensions": {"examples": {"augment": True}}})
LATE = 30  # a step with roll-outs


def poses(clip: int) -> Tensor:
    """(F, 6), smooth over time."""
    time = torch.arange(FRAMES)[:, None] / 8 + clip
    return torch.cat([torch.sin(time * torch.tensor([1.0, 1.3, 0.7, 0.9])) * 0.12, torch.zeros(FRAMES, 2)], 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("moving")
    lines = to_toml(CONFIG)
    alignment = lines[lines.index("[alignment]") : lines.index("[preparation]")]
    top = [f"{key} = {value!r}" for key, value in dataset_info(CONFIG).items() if key != "alignment"]
    (root / "dataset.toml").write_text("\n".join(top) + "\n" + alignment, encoding="utf-8")
    for number, name in enumerate(["a/0", "a/1", "b/0"]):
        stem, pose = root / "clips" / name, poses(number)
        stem.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.rand((1, 3, 6, 6), generator=torch.Generator().manual_seed(number)) * 1.6 - 0.8
        photo = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True)
        grid = undone(pose[:, None, None], pixel_grid(SIZE, torch.device("cpu")))
        frames = to_uint8(sampled(photo.expand(FRAMES, -1, -1, -1), grid)).numpy()
        write_clip(stem.with_suffix(".mp4"), iter(frames), torch.zeros(640 * FRAMES))
        save_file(labels(pose), stem.with_suffix(".safetensors"))
    clips = [Clip(name, name[0], "train", FRAMES, "") for name in ("a/0", "a/1", "b/0")]
    write_clips(root, clips)
    return Dataset(root)


def labels(pose: Tensor) -> dict[str, Tensor]:
    face = (2 * torch.from_numpy(mean_face(CONFIG.alignment, SIZE)) + 1) / SIZE - 1
    landmarks = ((done(pose[:, None], face) + 1) * SIZE - 1) / 2
    box = torch.tensor([20.0, 36.0, 44.0, 56.0]).repeat(FRAMES, 1)
    numbers = torch.rand((FRAMES, 3))
    return {
        "speech": torch.zeros(FRAMES, 8).half(),
        "landmarks": landmarks,
        "mouth_box": box,
        "lips": numbers,
        "eyes": torch.full((FRAMES,), 0.3),
    }


def batch_of(dataset: Dataset, config: Config, step: int = 0) -> Batch:
    return Batches(dataset, dataset.clips, config).batch(step, 0)


def within(pictures: Tensor) -> Tensor:
    """Away from the edges, where a moved picture shows what is not in the photo."""
    return pictures[..., 16:-16, 16:-16]


@pytest.mark.parametrize(("config", "tolerance"), [(CONFIG, 0.03), (AUGMENTED, 0.09)])
def test_the_photo_moved_by_the_given_pose_is_the_target(dataset: Dataset, config: Config, tolerance: float) -> None:
    """Except for identities of another clip, which show another picture; a bend of the picture is not in the pose."""
    batch = batch_of(dataset, override(config, {"extensions": {"examples": {"other_clip_share": 0.0}}}))
    moved = moved_photo(config, batch.identity, batch.cues.codes["pose"][:, 0]).picture
    error = within(moved - batch.target).abs().mean((1, 2, 3))
    in_place = within(batch.identity - batch.target).abs().mean((1, 2, 3))
    assert error.mean() < tolerance
    assert error.mean() < 0.6 * in_place.mean()


def test_landmarks_go_with_the_pictures(dataset: Dataset) -> None:
    """At the target's landmarks the grid of the pose reaches the identity's; both are where the pictures say."""
    for config, limit in ((CONFIG, 0.1), (AUGMENTED, 6.0)):
        batch = batch_of(dataset, config)
        assert batch.points is not None
        target, identity = batch.points.unbind(1)
        grid = moved_photo(config, batch.identity, batch.cues.codes["pose"][:, 0]).grid
        error = landmark_error(grid, target, identity)
        assert error.mean() < limit, "px^2; a bend of the picture is not in the pose"
    face = (2 * torch.from_numpy(mean_face(CONFIG.alignment, SIZE)) + 1) / SIZE - 1
    plain = batch_of(dataset, CONFIG).points
    assert plain is not None
    torch.testing.assert_close(plain[:, 1], face.expand(24, -1, -1), rtol=0, atol=0.03)


def test_motion_frames_are_the_identity_moved_where_they_are_wholly_anchored(dataset: Dataset) -> None:
    """Those of a lead too; at a video's start they are the identity itself."""
    batch = batch_of(dataset, CONFIG, LATE)
    assert batch.lead is not None
    assert batch.lead.motion_frames.shape[1] == 2
    index = batch.lead.index
    last = moved_photo(CONFIG, batch.identity[index], batch.lead.cues.codes["pose"][:, -1, 0]).picture
    torch.testing.assert_close(batch.motion_frames[index, 1], last, rtol=0, atol=1e-4)
    starts = [k for k in range(24) if torch.allclose(batch.motion_frames[k, 1], batch.identity[k], atol=1e-4)]
    assert len(starts) > 1


def test_identities_of_other_clips_bring_their_own_pose(dataset: Dataset) -> None:
    """In every example the identity's face is where the mean face is."""
    shares = {"extensions": {"examples": {"other_clip_share": 1.0}}}
    config = override(CONFIG, shares)
    batch = batch_of(dataset, config)
    assert batch.points is not None
    face = (2 * torch.from_numpy(mean_face(config.alignment, SIZE)) + 1) / SIZE - 1
    torch.testing.assert_close(batch.points[:, 1], face.expand(24, -1, -1), rtol=0, atol=0.03)
    others = within(moved_photo(config, batch.identity, batch.cues.codes["pose"][:, 0]).picture - batch.target)
    assert others.abs().mean((1, 2, 3)).max() > 0.2, "another picture"


def test_frames_with_the_head_at_the_edge_are_not_chosen(dataset: Dataset) -> None:
    source = Batches(dataset, dataset.clips, CONFIG)._source
    for clip in dataset.clips:
        facts = source.facts(clip)
        assert facts.framed == np.flatnonzero((facts.pose[:, :4].abs() <= 0.25).all(1)).tolist()
        assert len(facts.framed) == FRAMES
