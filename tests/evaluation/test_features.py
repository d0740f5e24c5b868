"""Features for FID and FVD: loading the two networks and calling them as published."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dheads.errors import DheadsError
from dheads.evaluation.features import CLIP_FRAMES, InceptionFeatures, VideoFeatures, load_i3d, load_inception
from dheads.evaluation.inception import Inception
from dheads.system.files import file_sha256
from dheads.weights import listing

# Features 0, 500, 1000, 1500 and 2047 of each of `pictures` by pytorch-fid 0.3.0 with the weights `known_state`.
PYTORCH_FID = [[2.45714, 0.68105, 2.23807, 2.47276, 6.63895], [2.3547, 0.78362, 2.21196, 2.47099, 6.81707]]


# --- Pictures


@pytest.fixture(scope="module")
def known_state() -> dict[str, Tensor]:
    """Reproducible weights for Inception, scaled so that the features neither vanish nor explode."""
    rng, state = np.random.default_rng(0), {}
    template = Inception().state_dict()
    for name in sorted(template):
        shape = tuple(template[name].shape)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("conv.weight"):
            value = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = name.endswith("bn.weight") + 0.1 * rng.standard_normal(shape)
        state[name] = torch.as_tensor(np.asarray(value, np.float32))
    return state


@pytest.fixture(scope="module")
def inception(known_state: dict[str, Tensor]) -> InceptionFeatures:
    network = Inception()
    network.load_state_dict(known_state)
    return InceptionFeatures(network, "cpu")


def pictures(count: int = 2, size: int = 128) -> np.ndarray:
    """Smooth coloured noise (count, size, size, 3) uint8."""
    coarse = torch.as_tensor(np.random.default_rng(1).integers(0, 256, (count, 3, 12, 12)), dtype=torch.float32)
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").round().byte().movedim(1, -1).numpy()


def test_inception_is_the_one_of_pytorch_fid(inception: InceptionFeatures) -> None:
    features = inception(pictures())
    assert (features.shape, features.dtype) == ((2, 2048), np.float32)
    np.testing.assert_allclose(features[:, [0, 500, 1000, 1500, 2047]], PYTORCH_FID, rtol=1e-4)


def test_no_picture_has_no_features(inception: InceptionFeatures) -> None:
    assert inception(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 2048)


def test_inception_is_loaded_from_the_listed_file(
    known_state: dict[str, Tensor], inception: InceptionFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "inception.pth"
    torch.save({**known_state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    listed(monkeypatch, path, "fid-inception")
    picture = pictures(1)
    np.testing.assert_array_equal(load_inception(progress=False)(picture), inception(picture))


# --- Clips


class Echo(nn.Module):
    """Called like the published I3D; its features are the arguments and the input."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        frames = video.mean(dim=(1, 3, 4))  # (B, T)
        options = torch.tensor([float(rescale), float(resize), float(return_features)])
        shape = torch.tensor([float(size) for size in video.shape])
        seen = torch.cat([options, shape, video.min()[None], video.max()[None]])
        return torch.cat([frames, seen.expand(len(frames), -1), torch.zeros(len(frames), 374)], dim=1)


@pytest.fixture
def i3d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VideoFeatures:
    path = tmp_path / "i3d.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.(script|save)` is deprecated", FutureWarning)
        torch.jit.script(Echo()).save(path)
    listed(monkeypatch, path, "fvd-i3d")
    return load_i3d(progress=False)


def test_i3d_is_called_as_published_on_clips_end_to_end(i3d: VideoFeatures) -> None:
    frames = np.zeros((2 * CLIP_FRAMES + 15, 8, 6, 3), np.uint8)
    frames[:] = np.arange(len(frames), dtype=np.uint8)[:, None, None, None]
    frames[20:22] = [[[[0]]], [[[255]]]]
    features = i3d(frames)
    assert (features.shape, features.dtype) == ((2, 400), np.float32)
    means = frames[:32, 0, 0, 0].reshape(2, 16) / 127.5 - 1
    np.testing.assert_allclose(features[:, :16], means, atol=1e-6)
    np.testing.assert_array_equal(features[:, 16:24], [[0, 0, 1, 1, 3, 16, 224, 224]] * 2)
    np.testing.assert_allclose(features[1, 24:26], [-1, 1], atol=1e-6)


def test_a_video_shorter_than_a_clip_has_no_features(i3d: VideoFeatures) -> None:
    assert i3d(np.zeros((CLIP_FRAMES - 1, 8, 8, 3), np.uint8)).shape == (0, 400)


@pytest.mark.parametrize(("name", "load"), [("fid-inception", load_inception), ("fvd-i3d", load_i3d)])
def test_a_file_of_another_hash_is_not_opened(
    name: str, load: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"as listed")
    listed(monkeypatch, path, name)
    path.write_bytes(b"something")
    with pytest.raises(DheadsError, match=r"cannot download .* put the file there by hand") as caught:
        load(progress=False)
    assert str(path) in str(caught.value)


def listed(monkeypatch: pytest.MonkeyPatch, path: Path, name: str) -> None:
    """Make weights.toml list a file that is in the cache under that name; its URL cannot be reached."""
    entry = {
        "kind": "metric",
        "file": path.name,
        "url": "http://127.0.0.1:1/absent",
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }
    monkeypatch.setattr(listing, "known", lambda: {name: entry})
    monkeypatch.setenv("DHEADS_HOME", str(path.parent))
