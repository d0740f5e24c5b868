"""Identity and head pose by the networks that do not ship."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import program

from dheads.errors import DheadsError
from dheads.evaluation.footage import Footage, track_face
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames

FRAMES = 6


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    return program("benchmarks/networks.py")


def footage(path: Path) -> Footage:
    frames = list(islice(read_frames(path), FRAMES))
    return track_face(path.name, lambda: frames, load_backend("mesh"))


def mirrored(video: Footage) -> Footage:
    frames = [frame[:, ::-1].copy() for frame in video.read()]
    points = video.landmarks * (-1, 1) + (frames[0].shape[1] - 1, 0)
    return replace(video, read=lambda: frames, landmarks=points)


def test_identity_and_pose(networks: ModuleType, shared: Path) -> None:
    folder = shared / "weights"
    pose = folder / "fsanet-1x1.onnx", folder / "fsanet-var.onnx"
    identity_net, pose_net = networks.load_networks(folder / "MobileFaceNet.onnx", pose)
    one = footage(shared / "data" / "hdtf" / "WDA_BobMenendez_000.mp4")
    other = footage(shared / "data" / "grid" / "other_lbbc2a.mp4")
    assert identity_net.measure(one, one)["net_identity"] > 0.8
    assert identity_net.measure(other, one)["net_identity"] < 0.4
    still = [next(iter(one.read()))] * FRAMES
    found = pose_net.measure(replace(one, read=lambda: still, landmarks=one.landmarks[:1].repeat(FRAMES, 0)), one)
    assert set(found) == {f"net_{name}_{angle}" for name in ("range", "speed") for angle in networks.ANGLES}
    assert max(found.values()) < 1e-6
    ours, theirs = (pose_net(next(iter(video.read())), video.landmarks[0]) for video in (other, mirrored(other)))
    assert np.abs(ours).max() < 15
    assert ours * (-1, 1, -1) == pytest.approx(theirs, abs=2)


def test_a_file_that_is_no_network(networks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"nothing")
    with pytest.raises(DheadsError, match=r"net\.onnx: is no ONNX file that OpenCV .* opens; give another file"):
        networks.load_networks(tmp_path / "net.onnx", None)
