"""Identity similarity: alignment and cosine against OpenCV's class, with a small network in place of SFace."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.errors import DheadsError
from dheads.evaluation.recognition import Recogniser, load_recogniser, sface_transform, similarity
from dheads.faces.alignment import apply_transform, invert_transform, warp
from dheads.faces.landmarks import find_face, load_backend
from dheads.media.photos import load_photo
from dheads.system.files import file_sha256
from dheads.weights import listing

# The weights of the stand-in network: from 8 x 8 means of each colour, red first, to 128 dimensions.
WEIGHTS = np.random.default_rng(0).standard_normal((192, 128)).astype(np.float32)
# Positions to which OpenCV's alignCrop moves the eyes, the tip of the nose and the corners of the mouth, px.
LEVEL = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])


@pytest.fixture
def recogniser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recogniser:
    listed(monkeypatch, tmp_path / "sface.onnx", stand_in())
    return load_recogniser(progress=False)


@pytest.fixture(scope="module")
def face(examples: Path) -> tuple[np.ndarray, np.ndarray]:
    """A real picture (H, W, 3) and its landmarks (68, 2)."""
    picture = load_photo(examples / "face.jpg")
    return picture, find_face(picture, load_backend("mesh"), "face.jpg")[0].landmarks


def with_points(points: np.ndarray) -> np.ndarray:
    """Landmarks (68, 2) of a face with these five points."""
    landmarks = np.zeros((68, 2))
    landmarks[36:42], landmarks[42:48] = points[0], points[1]
    landmarks[[30, 48, 54]] = points[2:]
    return landmarks


def moved(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    cos, sin = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    return points @ np.array([[cos, sin], [-sin, cos]]) + shift


def test_a_turned_and_enlarged_face_is_aligned_for_sface() -> None:
    points = moved(LEVEL, degrees=35, scale=2.5, shift=(200, -40))
    np.testing.assert_allclose(apply_transform(sface_transform(with_points(points)), points), LEVEL, atol=1e-9)


def test_alignment_and_embedding_are_those_of_opencvs_class(
    recogniser: Recogniser, face: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """At a scale close to 1, at which OpenCV does not skip pixels."""
    theirs = cv2.FaceRecognizerSF.create(str(tmp_path / "sface.onnx"), "")
    picture, landmarks = face
    side = round(picture.shape[0] * np.linalg.norm(sface_transform(landmarks)[0, :2]))
    small = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    points = (landmarks + 0.5) * (side / picture.shape[0]) - 0.5
    five = [points[36:42].mean(axis=0), points[42:48].mean(axis=0), points[30], points[48], points[54]]
    row = np.concatenate([np.zeros(4), np.ravel(five), [1]]).astype(np.float32)[None]
    crop, aligned = warp(small, sface_transform(points), 112), theirs.alignCrop(small, row)
    assert np.abs(crop.astype(float) - aligned)[10:-10, 10:-10].mean() < 3  # one pixel off: 12
    embedding = theirs.feature(cv2.cvtColor(crop, cv2.COLOR_RGB2BGR)).ravel()
    np.testing.assert_allclose(recogniser(small, points), embedding / np.linalg.norm(embedding), atol=1e-6)


def test_the_cosine_is_that_of_the_networks_numbers_for_red_green_and_blue(
    recogniser: Recogniser, face: tuple[np.ndarray, np.ndarray]
) -> None:
    picture, landmarks = face
    other = picture[..., ::-1]  # the same face in other colours

    def embedding(frame: np.ndarray) -> np.ndarray:
        crop = warp(frame, sface_transform(landmarks), 112).astype(float)
        means = crop.reshape(8, 14, 8, 14, 3).mean(axis=(1, 3))  # (8, 8, 3)
        found = means.transpose(2, 0, 1).ravel() @ WEIGHTS
        return found / np.linalg.norm(found)

    expected = embedding(other) @ embedding(picture)
    found = similarity(recogniser, [picture, other], np.stack([landmarks] * 2), picture, landmarks)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [1, expected], atol=1e-5)
    assert expected < 0.99


def test_size_and_position_do_not_matter(recogniser: Recogniser, face: tuple[np.ndarray, np.ndarray]) -> None:
    picture, landmarks = face
    side = picture.shape[0] // 2
    matrix = invert_transform(np.array([[1.9, 0.3, 5.0], [-0.3, 1.9, 8.0]]))
    elsewhere = warp(picture, matrix, side)
    found = similarity(recogniser, [elsewhere], apply_transform(matrix, landmarks)[None], picture, landmarks)
    assert found[0] > 0.99


def test_a_frame_without_a_face_has_no_similarity(recogniser: Recogniser, face: tuple[np.ndarray, np.ndarray]) -> None:
    picture, landmarks = face
    lost = np.full_like(landmarks, np.nan)
    found = similarity(recogniser, [picture, picture], np.stack([lost, landmarks]), picture, landmarks)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(1)
    with pytest.raises(DheadsError, match="the identity frame has no face"):
        similarity(recogniser, [picture], landmarks[None], picture, lost)


def test_a_file_of_another_hash_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sface.onnx"
    listed(monkeypatch, path, stand_in())
    path.write_bytes(stand_in()[:-1])
    with pytest.raises(DheadsError, match=r"cannot download .* put the file there by hand") as caught:
        load_recogniser(progress=False)
    assert str(path) in str(caught.value)


def test_a_file_that_opencv_cannot_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(monkeypatch, tmp_path / "sface.onnx", b"no network")
    with pytest.raises(DheadsError, match=r"OpenCV .* cannot open .*sface\.onnx: install another"):
        load_recogniser(progress=False)


def listed(monkeypatch: pytest.MonkeyPatch, path: Path, content: bytes) -> None:
    """Make weights.toml list a file in the cache with that content; its URL cannot be reached."""
    path.write_bytes(content)
    entry = {
        "kind": "metric",
        "file": path.name,
        "url": "http://127.0.0.1:1/absent",
        "bytes": len(content),
        "sha256": file_sha256(path),
    }
    monkeypatch.setattr(listing, "known", lambda: {"sface": entry})
    monkeypatch.setenv("DHEADS_HOME", str(path.parent))


# --- An ONNX file in protobuf encoding: fields of a number and a value


def stand_in() -> bytes:
    """A network with SFace's input and output, (1, 3, 112, 112) -> (1, 128): means of 14 x 14 px, then a matrix."""
    window = [_bytes(5, _bytes(1, name) + b"".join(_int(8, 14) for _ in "hw") + _int(20, 7)) for name in _WINDOW]
    nodes = [
        _node("AveragePool", ["data"], "means", *window),
        _node("Flatten", ["means"], "flat"),
        _node("MatMul", ["flat", "weights"], "fc1"),
    ]
    matrix = b"".join(_int(1, size) for size in WEIGHTS.shape) + _int(2, 1) + _bytes(8, "weights")
    graph = [_bytes(1, node) for node in nodes]
    graph += [_bytes(2, "stand-in"), _bytes(5, matrix + _bytes(9, WEIGHTS.astype("<f4").tobytes()))]
    graph += [_bytes(11, _tensor("data", 1, 3, 112, 112)), _bytes(12, _tensor("fc1", 1, 128))]
    return _int(1, 7) + _bytes(8, _int(2, 11)) + _bytes(7, b"".join(graph))


_WINDOW = ("kernel_shape", "strides")


def _node(kind: str, inputs: list[str], output: str, *attributes: bytes) -> bytes:
    named = b"".join(_bytes(1, name) for name in inputs) + _bytes(2, output) + _bytes(3, output)
    return named + _bytes(4, kind) + b"".join(attributes)


def _tensor(name: str, *shape: int) -> bytes:
    sizes = b"".join(_bytes(1, _int(1, size)) for size in shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, _int(1, 1) + _bytes(2, sizes)))


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)
