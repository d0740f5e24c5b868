"""FAN and S3FD by the package face-alignment, with small networks as substitutes."""

from __future__ import annotations

import math
import os
import sys
import types
import urllib.error
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_landmarks import frames_of

from dheads.errors import DheadsError
from dheads.faces.fan import FanBackend
from dheads.faces.landmarks import find_face, load_backend

# Compiling face-alignment's loops would take longer than these tests.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

BLAZEFACE = {"detector": "blazeface.pth", "anchor": "anchors.npy"}


def stand_in(monkeypatch: pytest.MonkeyPatch, network: type) -> None:
    module = types.ModuleType("face_alignment")
    module.LandmarksType = types.SimpleNamespace(TWO_D=1)
    module.FaceAlignment = network
    monkeypatch.setitem(sys.modules, "face_alignment", module)


class BrightSpots:
    """A substitute for FAN and S3FD: a face is a white spot, every landmark its centre. It records its batches."""

    def __init__(self, landmarks_type: int, device: str, compile: bool, max_batch_size: int) -> None:
        assert (landmarks_type, device, compile, max_batch_size) == (1, "cpu", False, FanBackend.BATCH)
        self.face_detector = self
        self.batches: list[tuple[int, ...]] = []  # (B, 3, H, W) of each batch the detector was given

    def get_landmarks_from_image(
        self, image: np.ndarray, detected_faces: list[np.ndarray] | None = None, return_bboxes: bool = False
    ) -> tuple | list[np.ndarray]:
        assert return_bboxes == (detected_faces is None)
        boxes = spots(image) if detected_faces is None else detected_faces
        if not boxes:
            return None, None, None
        points = [np.repeat([centre_of_brightness(image, box)], 68, axis=0) for box in boxes]
        return (points, None, boxes) if return_bboxes else points

    def detect_from_batch(self, batch: torch.Tensor) -> list[list[np.ndarray]]:
        assert batch.dtype == torch.uint8
        self.batches.append(tuple(batch.shape))
        return [spots(picture.movedim(0, -1).numpy()) for picture in batch]


def spots(image: np.ndarray) -> list[np.ndarray]:
    _, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 200).astype(np.uint8))
    return [np.array([x, y, x + w, y + h, 0.9]) for x, y, w, h, _ in stats[1:]]


def centre_of_brightness(image: np.ndarray, box: np.ndarray) -> tuple[float, float]:
    x0, y0, x1, y1 = (round(float(v)) for v in box[:4])
    assert image[y0:y1, x0:x1].size, "the box lies beyond the picture"
    rows, columns = np.nonzero(image[y0:y1, x0:x1, 0] > 200)
    return x0 + columns.mean(), y0 + rows.mean()


def scene(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (100, 200)) -> np.ndarray:
    """A black picture with white spots at x0, y0, x1, y1."""
    image = np.zeros((*shape, 3), np.uint8)
    for x0, y0, x1, y1 in boxes:
        image[y0:y1, x0:x1] = 255
    return image


def test_fan_gives_faces_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    backend = load_backend("fan")
    image = scene((10, 10, 20, 20), (100, 50, 140, 90))
    found = backend.detect(image)
    assert [face.box for face in found] == [(100, 50, 140, 90), (10, 10, 20, 20)]
    np.testing.assert_allclose(found[0].landmarks[5], [119.5, 69.5])
    assert found[0].landmarks.dtype == np.float32
    assert found[0].score == 0.9
    assert backend.detect(np.zeros_like(image)) == []
    with pytest.raises(DheadsError, match="no face found"):
        find_face(np.zeros_like(image), backend, "a.png")


def test_fan_tracks_in_batches_as_the_frames_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    backend = load_backend("fan")
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for step in range(40):
            assert step < 16 * (len(backend._net.batches) + 1)  # never more than a batch ahead
            taken += 1
            yield scene((100 + step, 40, 130 + step, 80), (10, 10, 20 + step, 20 + step))

    landmarks = backend.track(frames())
    assert taken == 40
    assert [shape[0] for shape in backend._net.batches] == [16, 16, 8]
    assert landmarks.dtype == np.float32
    # It stays with the spot that was the largest at first, across batches, though the other outgrows it.
    expected = np.stack([114.5 + np.arange(40), np.full(40, 59.5)], axis=-1)
    np.testing.assert_allclose(landmarks, np.repeat(expected[:, None], 68, axis=1), atol=1e-4)
    assert backend.track([]).shape == (0, 68, 2)


def test_fan_tracks_one_person_through_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    nobody, person, other = scene(), scene((20, 20, 60, 60)), scene((120, 10, 190, 80))
    both = scene((20, 20, 60, 60), (120, 10, 190, 80))
    landmarks = load_backend("fan").track([nobody, person, both, other, nobody, other, both, nobody])
    assert np.isnan(landmarks).all(axis=(1, 2)).tolist() == [True, False, False, True, True, True, False, True]
    assert np.abs(landmarks[[1, 2, 6]] - 39.5).max() < 1e-4
    assert np.isnan(load_backend("fan").track([nobody] * 20)).all()


def test_fan_takes_large_frames_in_small_batches_and_shrinks_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    backend = load_backend("fan")
    large = scene((600, 300, 1000, 700), shape=(1000, 2000))
    landmarks = backend.track([scene((10, 10, 40, 40))] * 3)
    landmarks = backend.track([large] * 2)
    assert backend._net.batches == [(3, 3, 100, 200), (1, 3, 1000, 2000), (1, 3, 1000, 2000)]
    np.testing.assert_allclose(landmarks[:, 5], [[799.5, 499.5]] * 2, atol=1e-3)
    huge = scene((1200, 600, 2000, 1400), shape=(2000, 4000))
    landmarks = backend.track([huge])
    (_, _, height, width) = backend._net.batches[-1]
    assert 0.99 * 2**21 < height * width <= 1.01 * 2**21
    np.testing.assert_allclose(landmarks[0, 5], [1599.5, 999.5], atol=4)  # in px of the whole frame


def test_fan_looks_at_large_photos_as_a_whole_and_then_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Coarse(BrightSpots):
        def get_landmarks_from_image(self, image: np.ndarray, **options: bool) -> tuple:
            """Like S3FD, it finds nothing smaller than 16 px."""
            seen.append(image.shape[:2])
            points, _, boxes = super().get_landmarks_from_image(image, **options)
            large = [k for k, box in enumerate(boxes or []) if box[2] - box[0] >= 16]
            return [points[k] for k in large], None, [boxes[k] for k in large]

    stand_in(monkeypatch, Coarse)
    backend = load_backend("fan")
    large = scene((3000, 1500, 3600, 2100), shape=(3000, 5000))
    (face,) = backend.detect(large)
    np.testing.assert_allclose(face.landmarks[3], [3299.5, 1799.5], atol=2)
    assert len(seen) == 1
    # 12 px and 9 px in the whole picture.
    found = backend.detect(scene((3000, 1500, 3040, 1540), (60, 20, 92, 52), shape=(3000, 5000)))
    centres = sorted(face.landmarks[3].tolist() for face in found)
    np.testing.assert_allclose(centres, [[75.5, 35.5], [3019.5, 1519.5]], atol=1)
    assert max(height * width for height, width in seen) <= FanBackend.BATCH_PX
    assert 2 < len(seen) < 25


def test_fan_tracks_on_when_the_frames_change_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    small, wide = scene((20, 20, 60, 60)), scene((20, 20, 60, 60), shape=(120, 300))
    landmarks = load_backend("fan").track([small, small, wide, small])
    assert np.abs(landmarks - 39.5).max() < 1e-4


def test_faces_at_the_edge_see_nothing_of_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    class WideView(BrightSpots):
        def get_landmarks_from_image(self, image: np.ndarray, detected_faces: list[np.ndarray], **_: bool) -> list:
            # Like FAN, it looks beyond the box: 1.2 times its side from its centre.
            wide = [np.array([x0 - 28, y0 - 28, x1 + 28, y1 + 28]).clip(0) for x0, y0, x1, y1 in detected_faces]
            return super().get_landmarks_from_image(image, wide)

    stand_in(monkeypatch, WideView)
    top, bottom = scene((60, 0, 100, 40)), scene((60, 60, 100, 100))
    landmarks = load_backend("fan").track([bottom, bottom, top, top])
    np.testing.assert_allclose(landmarks[:2, 0], [[79.5, 79.5]] * 2, atol=1e-4)
    assert np.isnan(landmarks[2:]).all()  # a jump of more than a face
    landmarks = load_backend("fan").track([scene((60, 25, 100, 65)), bottom, scene((60, 25, 100, 65)), top])
    np.testing.assert_allclose(landmarks[:, 0, 1], [44.5, 79.5, 44.5, 19.5], atol=1e-4)


# ---- The real face-alignment, with untrained networks ----


@pytest.fixture(scope="module")
def untrained_fan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the published one, with random weights and one hourglass instead of four."""
    models = pytest.importorskip("face_alignment.models")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fan") / "2DFAN.pth"
    torch.save(models.FAN(1).state_dict(), path)
    return path


def test_fan_agrees_with_face_alignment_s_own_batches(
    monkeypatch: pytest.MonkeyPatch, untrained_fan: Path, shared: Path
) -> None:
    api = pytest.importorskip("face_alignment.api")
    detector = {f"path_to_{kind}": str(shared / "weights" / name) for kind, name in BLAZEFACE.items()}
    if not all(Path(path).exists() for path in detector.values()):
        pytest.skip("the weights of blazeface are not there")
    monkeypatch.setitem(api.models_urls, "2DFAN-1", "")
    monkeypatch.setattr(api, "load_file_from_url", lambda _: untrained_fan)
    real = partial(api.FaceAlignment, network_size=1, face_detector="blazeface", face_detector_kwargs=detector)
    monkeypatch.setattr("face_alignment.FaceAlignment", real)
    backend = load_backend("fan")
    frames = np.stack(list(islice(frames_of(shared / "data" / "grid" / "s1_lgbf8n.mp4"), 11, 14)))
    landmarks = backend.track(frames)
    batch = torch.from_numpy(frames).movedim(-1, 1)
    with pytest.warns(UserWarning, match="No faces were detected"):
        expected, _, boxes = backend._net.get_landmarks_from_batch(batch, return_bboxes=True)
    assert [len(found) for found in boxes] == [0, 1, 1]
    assert np.isnan(landmarks[0]).all()
    assert np.array_equal(landmarks[1:], np.stack(expected[1:]).astype(np.float32))


def test_fan_reads_what_s3fd_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3FD's own decoding of its network's maps, with a network that takes bright cells for faces."""
    api = pytest.importorskip("face_alignment.api")
    sfd = pytest.importorskip("face_alignment.detection.sfd.sfd_detector")

    class Brightness(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> list[torch.Tensor]:
            maps = []
            for scale in range(6):
                bright = torch.nn.functional.avg_pool2d(batch.mean(dim=1, keepdim=True), 2 ** (scale + 2))
                face = (bright if scale == 3 else bright * 0) - 50  # anchors of 128 px, every 32 px
                maps += [torch.cat([-face, face], dim=1), face.new_zeros(len(face), 4, *face.shape[2:])]
            return maps

    class Centre(torch.nn.Module):
        """A substitute for FAN: every landmark is at the middle of the crop."""

        def forward(self, crops: torch.Tensor) -> torch.Tensor:
            heatmaps = crops.new_zeros(len(crops), 68, 64, 64)
            heatmaps[:, :, 31:33, 31:33] = 1
            return heatmaps

    monkeypatch.setattr(sfd, "s3fd", Brightness)
    monkeypatch.setattr(sfd, "load_state_dict_from_url", lambda _: {})
    monkeypatch.setattr(api.FaceAlignment, "_load_native", lambda *_: Centre())
    backend = load_backend("fan")
    dark = np.zeros((256, 384, 3), np.uint8)
    face = dark.copy()
    face[96:128, 192:224] = 255  # the cell whose anchor is centred on (208, 112)
    two = face.copy()
    two[192:224, 32:64] = 255
    landmarks = backend.track([dark, face, two, dark, face])
    assert np.isnan(landmarks).all(axis=(1, 2)).tolist() == [True, False, False, True, False]
    # FAN's crop is centred 0.12 of the box above its middle; whole pixels.
    assert np.abs(landmarks[[1, 2, 4]] - [208, 112 - 0.12 * 128]).max() <= 3
    assert np.isnan(backend.track([dark])).all()
    assert backend.detect(dark) == []
    tiny = np.zeros((20, 300, 3), np.uint8)  # too small for S3FD
    assert np.isnan(backend.track([tiny, tiny])).all()
    assert backend.detect(tiny) == []
    assert len(backend.detect(two)) == 2
    assert backend.detect(face)[0].box == pytest.approx((144, 48, 272, 176))


def test_fan_tries_the_picture_tilted(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyLevelEyes:
        """Takes two spots for eyes only if they lie on one level."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def get_landmarks_from_image(self, image: np.ndarray, return_bboxes: bool) -> tuple:
            _, _, _, centres = cv2.connectedComponentsWithStats((image[..., 0] > 128).astype(np.uint8))
            if len(centres) != 3 or abs(centres[1][1] - centres[2][1]) > 5:
                return None, None, None
            points = np.concatenate([np.repeat(c[None], 34, axis=0) for c in sorted(centres[1:], key=lambda c: c[0])])
            return [points], None, [np.array([0, 0, 9, 9, 0.8])]

    stand_in(monkeypatch, OnlyLevelEyes)
    image = np.zeros((160, 200, 3), np.uint8)
    left, right = (70, 60), (70 + round(50 * math.cos(math.radians(40))), 60 + round(50 * math.sin(math.radians(40))))
    for spot in (left, right):
        cv2.circle(image, spot, 8, (255, 255, 255), -1)
    (face,) = load_backend("fan").detect(image)
    np.testing.assert_allclose(face.landmarks[[0, 67]], [left, right], atol=1)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_fan_without_its_weights(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    stand_in(monkeypatch, fail)
    with pytest.raises(DheadsError, match=r"fan cannot load its weights.*2DFAN4-11f355bf06\.pth\.tar"):
        load_backend("fan")


def test_fan_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(DheadsError, match="pip install face-alignment"):
        load_backend("fan")
