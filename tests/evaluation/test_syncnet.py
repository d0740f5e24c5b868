"""SyncNet: reference values of the released code, windows, search, errors and loading."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dheads.errors import DheadsError
from dheads.evaluation import syncnet
from dheads.evaluation.syncnet import SyncNet, load_syncnet, offset_of, sync
from dheads.evaluation.syncnet_crops import SIZE
from dheads.weights import listing

FRAMES = 24


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "syncnet.json").read_text())


def formula_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights with which the reference values were computed."""
    state = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        count = math.prod(shape)
        s = np.sin(0.37 * np.arange(count) + i).reshape(shape)
        if len(shape) > 1:
            s = s * np.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("running_var"):
            s = 1 + 0.2 * s**2
        elif name.endswith("weight"):
            s = 1 + 0.1 * s
        else:
            s = 0.05 * s
        kind = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        state[name] = torch.from_numpy(np.asarray(s)).to(kind)
    return state


@pytest.fixture(scope="module")
def state(golden: dict[str, Any]) -> dict[str, Tensor]:
    return formula_state(golden["state_names"])


@pytest.fixture(scope="module")
def net(state: dict[str, Tensor]) -> SyncNet:
    net = SyncNet()
    net.load_state_dict(state)
    return net.eval()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """(24, 224, 224, 3) uint8 BGR, as the network expects them."""
    t, y, x, c = np.meshgrid(*map(np.arange, (FRAMES, SIZE, SIZE, 3)), indexing="ij", sparse=True)
    waves = np.sin(0.05 * x + 0.03 * y * (1 + 0.1 * t) + 0.4 * t + c)
    return np.round(127.5 + 127.5 * waves).astype(np.uint8)


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    u = np.arange(FRAMES * 640) / 16_000
    chirp = np.sin(2 * np.pi * (200 + 900 * u) * u)
    return np.round(8000 * chirp * (0.6 + 0.4 * np.sin(8 * np.pi * u))).astype(np.int16)


# ---- Reference values ----


def test_names_and_shapes_are_the_released_networks(golden: dict[str, Any]) -> None:
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in SyncNet().state_dict().items()}
    assert shapes == golden["state_names"]


def test_embeddings_and_sync_equal_the_reference(
    golden: dict[str, Any], net: SyncNet, pictures: np.ndarray, sound: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}

    def noted(sounds: Tensor, faces: Tensor, reach: int) -> syncnet.Sync:
        seen.update(aud=sounds, lip=faces)
        return offset_of(sounds, faces, reach)

    monkeypatch.setattr(syncnet, "offset_of", noted)
    found = sync(net, iter(pictures[..., ::-1]), sound, batch=7)  # the last batch is smaller
    for name, embeddings in seen.items():
        assert embeddings.shape == (golden["windows"], 1024)
        np.testing.assert_allclose(embeddings[0, :8], golden[f"{name}_w0_first8"], atol=1e-3)
        np.testing.assert_allclose(embeddings[-1, :8], golden[f"{name}_last_first8"], atol=1e-3)
        np.testing.assert_allclose(embeddings.norm(dim=1), golden[f"{name}_norms"], atol=1e-3)
    assert found.offset == golden["offset"]
    assert found.distance == pytest.approx(golden["min_dist"], abs=1e-3)
    assert found.confidence == pytest.approx(golden["confidence"], abs=1e-3)
    for k, distance in enumerate(golden["mean_dist_by_shift"]):
        shift = torch.nn.functional.pad(seen["aud"], (0, 0, 15, 15))[k : k + golden["windows"]]
        assert float((seen["lip"] - shift).norm(dim=1).mean()) == pytest.approx(distance, abs=1e-3)


# ---- Search ----


@pytest.fixture
def embeddings() -> Tensor:
    """Embeddings of 60 windows, all different, of about the norm of SyncNet's."""
    return torch.nn.functional.normalize(torch.randn(60, 1024)) * 10


@pytest.mark.parametrize("late", [-15, -5, 0, 5, 15])
def test_shifted_sound_moves_the_offset(embeddings: Tensor, late: int) -> None:
    sound = torch.roll(embeddings, late, dims=0)  # its window i is heard at i + late
    found = offset_of(sound, embeddings)
    assert found.offset == -late
    assert found.distance < found.confidence, "all but the wrapped windows fit"


def test_pictures_that_equal_their_sound_have_no_distance(embeddings: Tensor) -> None:
    found = offset_of(embeddings, embeddings)
    assert (found.offset, found.distance) == (0, pytest.approx(0, abs=1e-3))
    # Unrelated embeddings of norm r lie r sqrt 2 apart; beyond the ends, where there is no sound, r.
    assert 10 < found.confidence < 14.2


def test_reach_limits_the_offset(embeddings: Tensor) -> None:
    assert abs(offset_of(torch.roll(embeddings, 9, dims=0), embeddings, reach=4).offset) <= 4


class Brightness(torch.nn.Module):
    """Stands in for SyncNet: embeds the brightness of a window's first picture, and whether a window is loud."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[int] = []

    def embed_picture(self, pictures: Tensor) -> Tensor:
        assert pictures.shape[1:] == (3, 5, SIZE, SIZE)
        self.batches.append(len(pictures))
        return pictures[:, :, 0].mean(dim=(1, 2, 3)).unsqueeze(1)

    def embed_sound(self, sounds: Tensor) -> Tensor:
        assert sounds.shape[1:] == (1, 13, 20)
        # The energy of the first frame's second column, which lies inside the frame, as its logarithm.
        return (sounds[:, 0, 0, 1] > 10).float().unsqueeze(1) * 200


def blinking(on: np.ndarray) -> Iterator[np.ndarray]:
    """Pictures that are bright where `on` is true."""
    return (np.full((SIZE, SIZE, 3), 200 * int(bright), np.uint8) for bright in on)


def beeping(on: np.ndarray) -> np.ndarray:
    tone = 8000 * np.sin(2 * np.pi * 1000 * np.arange(640) / 16_000)
    return np.concatenate([tone * bright for bright in on]).astype(np.int16)


@pytest.mark.parametrize("late", [0, 5, -5])
def test_sound_that_comes_later_lowers_the_offset_by_as_many_frames(late: int) -> None:
    on = np.random.default_rng(1).random(120) < 0.4
    found = sync(Brightness(), blinking(on), beeping(np.roll(on, late)))
    assert found.offset == -late


def test_pictures_are_read_once_in_batches_and_only_as_far_as_there_is_sound() -> None:
    on = np.arange(60) % 7 < 3
    crops = blinking(on)
    net = Brightness()
    sync(net, crops, beeping(on[:48]), batch=20)
    assert net.batches == [20, 20, 3], "48 frames of sound have 43 windows"
    assert sum(1 for _ in crops) == 12


def test_the_network_sees_blue_first() -> None:
    seen: list[Tensor] = []
    net = Brightness()
    net.embed_picture = lambda x: seen.append(x) or torch.zeros(len(x), 1)
    crops = np.zeros((7, SIZE, SIZE, 3), np.uint8)
    crops[...] = (10, 20, 255)  # RGB
    crops[3, 5, 9] = (1, 2, 3)
    sync(net, crops, beeping(np.arange(7) % 2))
    assert seen[0].shape == (2, 3, 5, SIZE, SIZE)
    assert seen[0][0, :, 0, 0, 0].tolist() == [255, 20, 10]
    assert seen[0][0, :, 3, 5, 9].tolist() == seen[0][1, :, 2, 5, 9].tolist() == [3, 2, 1]


@pytest.mark.parametrize("frames", [0, 1, 4, 5])
def test_a_clip_of_too_few_frames_is_refused(frames: int) -> None:
    on = np.arange(25) % 2 == 0
    with pytest.raises(DheadsError, match="needs at least 6 frames and their sound"):
        sync(Brightness(), blinking(on[:frames]), beeping(on))
    with pytest.raises(DheadsError, match="needs at least 6 frames and their sound"):
        sync(Brightness(), blinking(on), beeping(on)[: frames * 640])


@pytest.mark.parametrize("level", [0, 500])
def test_silence_is_refused(level: int) -> None:
    hum = level + np.random.default_rng(0).integers(-3, 4, 25 * 640)
    with pytest.raises(DheadsError, match="is silent, so SyncNet cannot say"):
        sync(Brightness(), blinking(np.arange(25) % 2), hum.astype(np.int16))


def test_the_loudest_sound_is_not_taken_for_silence() -> None:
    square = np.where(np.arange(25 * 640) % 16 < 8, 32767, -32768).astype(np.int16)
    assert np.isfinite(sync(Brightness(), blinking(np.arange(25) % 2), square).distance)


# ---- Loading ----


def entry_of(content: bytes, url: str = "http://127.0.0.1:1/w") -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"kind": "metric", "file": "net.model", "url": url, "sha256": digest, "bytes": len(content)}


@pytest.fixture
def list_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Saves an object, or bytes, in the cache folder as the file that weights.toml lists for SyncNet."""

    def save(content: Any) -> Path:
        path = tmp_path / "net.model"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path, _use_new_zipfile_serialization=False)  # as torch 0.3 did
        monkeypatch.setattr(listing, "known", lambda: {"syncnet": entry_of(path.read_bytes())})
        monkeypatch.setenv("DHEADS_HOME", str(tmp_path))
        return path

    return save


def test_the_listed_file_is_the_released_one() -> None:
    entry = listing.known()["syncnet"]
    assert entry["sha256"].startswith("961e8696")
    assert entry["sha256"].endswith("5442")
    assert entry["url"] == "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model"


def test_a_file_is_downloaded_and_computes_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor], net: SyncNet
) -> None:
    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    torch.save(state, served / "net.model")
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/net.model"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        content = (served / "net.model").read_bytes()
        monkeypatch.setattr(listing, "known", lambda: {"syncnet": entry_of(content, url)})
        monkeypatch.setenv("DHEADS_HOME", str(cache))
        try:
            loaded = load_syncnet("cpu", progress=False)
        finally:
            server.shutdown()
            thread.join()
    assert {path.name for path in cache.iterdir()} == {"net.model", ".lock"}
    assert not loaded.training
    columns = torch.randn(2, 1, 13, 20)
    with torch.inference_mode():
        assert torch.equal(loaded.embed_sound(columns), net.embed_sound(columns))


def test_a_file_of_old_torch_lacks_counts_of_batches(list_file: Callable, state: dict[str, Tensor]) -> None:
    list_file({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")})
    loaded = load_syncnet("cpu", progress=False).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_absent_and_offline_says_which_file_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/net.model"
    monkeypatch.setattr(listing, "known", lambda: {"syncnet": entry_of(b"x", url)})
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path))
    with pytest.raises(DheadsError, match="put the file there by hand") as caught:
        load_syncnet("cpu", progress=False)
    assert str(tmp_path / "net.model") in str(caught.value)


class Harmful:
    def __reduce__(self) -> tuple:
        return print, ("code was run",)


def lacking(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "netfclip.3.bias"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lacking, "netfclip.3.bias"),
        (lambda state: {**state, "extra.weight": torch.zeros(1)}, "extra.weight"),
        (lambda state: {**state, "netfcaud.3.bias": torch.zeros(512)}, "netfcaud.3.bias"),
        (lambda state: {"netfcaud.3.bias": state["netfcaud.3.bias"]}, "Missing key"),
        (lambda _: {}, "Missing key"),
        (lambda _: [torch.zeros(1)], "it holds no named tensors"),
        (lambda _: {"netfcaud.3.bias": "text"}, "it holds no named tensors"),
        (lambda _: {3: torch.zeros(1)}, "it holds no named tensors"),
        (lambda _: b"no weights at all", "it holds no named tensors"),
        (lambda _: b"", "it holds no named tensors"),
        (lambda _: Harmful(), "it holds no named tensors"),
    ],
)
def test_another_file_is_never_scored_with(
    list_file: Callable,
    state: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], Any],
    reason: str,
) -> None:
    path = list_file(change(state))
    with pytest.raises(DheadsError, match="is not the released SyncNet") as caught:
        load_syncnet("cpu", progress=False)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400
    assert capsys.readouterr().out == ""
