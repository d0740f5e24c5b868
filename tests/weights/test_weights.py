"""Checkpoint files, the list of known weights, and downloads from a small server on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dheads import config as configuration
from dheads.conditioning import Cues
from dheads.config import Config
from dheads.errors import DheadsError
from dheads.extensions.motion import condition_with
from dheads.extensions.network import ExtendedUNet
from dheads.system.files import file_sha256
from dheads.weights import checkpoints, fetching, licences, listing
from dheads.weights.download import download, receive

INFO = {"steps": 3, "license": "CC-BY-NC-4.0", "data": ["clips"]}


@pytest.fixture
def tiny() -> Config:
    return configuration.preset("tiny")


@pytest.fixture
def state(tiny: Config) -> dict[str, Tensor]:
    return {name: torch.randn_like(tensor) for name, tensor in ExtendedUNet(tiny).state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path, tiny: Config, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "run" / "model.safetensors"
    checkpoints.save_checkpoint(path, state, tiny, INFO)
    return path


def refuse(path: Path, reason: str) -> None:
    """Loading raises a one-line error that names the file and the reason."""
    with pytest.raises(DheadsError, match=reason) as caught:
        checkpoints.load_model(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Checkpoints


def test_what_is_saved_is_loaded(saved: Path, tiny: Config, state: dict[str, Tensor]) -> None:
    checkpoint = checkpoints.load_checkpoint(saved)
    assert checkpoint.config == tiny
    assert checkpoint.info == INFO
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.tensors[name], state[name]) for name in state)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path, tiny: Config, saved: Path) -> None:
    state = checkpoints.load_checkpoint(saved).tensors
    half = tmp_path / "half.safetensors"
    checkpoints.save_checkpoint(half, state, tiny, INFO, dtype=torch.float16)
    loaded = checkpoints.load_checkpoint(half).tensors
    assert half.stat().st_size < 0.6 * saved.stat().st_size
    assert all(torch.equal(loaded[name], state[name].half().float()) for name in state)


def test_loaded_network_computes_what_the_saved_one_did(saved: Path, tiny: Config, state: dict[str, Tensor]) -> None:
    original = ExtendedUNet(tiny)
    original.load_state_dict(state)
    loaded, config, info = checkpoints.load_model(str(saved))
    assert (config, info) == (tiny, INFO)
    assert not loaded.training
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in loaded.parameters())
    cond, side, lips = tiny.conditioning, tiny.network.image_size, tiny.extensions.codes["lips"]
    condition = condition_with(
        tiny,
        torch.rand(1, 3, side, side),
        torch.rand(1, cond.motion_frames, 3, side, side),
        Cues(
            torch.randn(1, 2 * cond.audio_context + 1, cond.speech_dim),
            {"lips": torch.randn(1, 2 * lips.context + 1, 3)},
        ),
    )
    x_t, t = torch.randn(1, 3, side, side), torch.tensor([500])
    with torch.no_grad():
        assert torch.equal(loaded(x_t, t, condition).prediction, original.eval()(x_t, t, condition).prediction)


def test_unwritable_folder(tmp_path: Path, tiny: Config) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DheadsError, match="cannot write the checkpoint"):
        checkpoints.save_checkpoint(tmp_path / "file" / "model.safetensors", {"a": torch.ones(1)}, tiny, INFO)


def test_absent_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(DheadsError, match="there is no checkpoint file") as caught:
            checkpoints.load_checkpoint(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5_000, -1])
def test_cut_off_file(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    refuse(saved, "is no safetensors file, or is cut off or altered")


@pytest.mark.parametrize(
    "content",
    [
        b"not weights at all" * 100,
        b"PK\x03\x04" + bytes(500),
        (2**63).to_bytes(8, "little") + b"{}",  # a header of 9 exabytes
        (200_000_000).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}   ',
    ],
)
def test_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "strange.safetensors"
    path.write_bytes(content)
    refuse(path, "is no safetensors file, or is cut off or altered")


def test_pickle_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {}}, path)
    refuse(path, "is no safetensors file; dheads opens no others")
    refuse(path.rename(tmp_path / "model.safetensors"), "is no safetensors file, or is cut off or altered")


def test_safetensors_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    refuse(path, "not a checkpoint of dheads")


@pytest.mark.parametrize("part", ["tensor", "config"])
def test_one_altered_byte_is_noticed(saved: Path, part: str) -> None:
    content = bytearray(saved.read_bytes())
    position = -7 if part == "tensor" else content.index(b"tiny")
    content[position] ^= 1
    saved.write_bytes(content)
    refuse(saved, "was altered after it was written")


def forge(path: Path, tensors: dict[str, Tensor], **texts: str) -> None:
    """Writes a file with any metadata and a correct checksum, as a hostile one may have."""
    texts = {"format": checkpoints.FORMAT, **texts}
    save_file(tensors, path, metadata={**texts, "sha256": checkpoints._digest(texts, tensors)})


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({}, "lacks a readable configuration"),
        ({"config": "{}"}, "lacks a readable configuration"),
        ({"config": "{", "info": "{}"}, "lacks a readable configuration"),
        ({"config": "[" * 100_000, "info": "{}"}, "lacks a readable configuration"),
        ({"config": "{}", "info": "[]"}, "lacks a readable training summary"),
        ({"config": "[]", "info": "{}"}, "a configuration that this version cannot use"),
        ({"config": '{"network": {"image_sise": 64}}', "info": "{}"}, "did you mean"),
        ({"config": '{"network": {"image_size": "big"}}', "info": "{}"}, "must be int"),
    ],
)
def test_invalid_metadata(tmp_path: Path, texts: dict[str, str], reason: str) -> None:
    path = tmp_path / "forged.safetensors"
    forge(path, {"a": torch.ones(1)}, **texts)
    refuse(path, reason)


@pytest.mark.parametrize(
    "change",
    [
        {"network": {"model_channels": 4096, "head_channels": 4096}},
        {"network": {"model_channels": 10**12}},
        {"network": {"model_channels": -16}},
        {"network": {"num_res_blocks": 10**9}},
        {"network": {"channel_mult": []}},
        {"extensions": {"patches": {"size": 0, "detail_channels": 0}}},
        {"network": {"head_channels": 0}},
        {"diffusion": {"num_steps": 10**12}},
        {"alignment": {"eye_distance": float("nan")}},
        {"conditioning": {"motion_frames": 3}},
        {"extensions": {"codes": {}}},
        {"extensions": {"codes": {"brows": {}}}},
        {"conditioning": {"speech_dim": 10**18}},
    ],
)
def test_configuration_that_does_not_fit_the_tensors(
    tmp_path: Path, tiny: Config, state: dict[str, Tensor], change: dict[str, Any]
) -> None:
    path = tmp_path / "forged.safetensors"
    values = configuration.to_dict(tiny)
    for section, fields in change.items():
        values[section] |= fields
    forge(path, state, config=json.dumps(values), info="{}")
    refuse(path, r"do not fit|sizes that no real model has|cannot use")


def test_missing_and_surplus_tensors(tiny: Config, state: dict[str, Tensor]) -> None:
    fewer = {name: tensor for name, tensor in state.items() if name != "stem.weight"}
    with pytest.raises(DheadsError, match=r"do not fit .*stem\.weight"):
        checkpoints.build_model(checkpoints.Checkpoint(tiny, fewer, {}, Path("file")))
    with pytest.raises(DheadsError, match=r"do not fit .*surplus"):
        checkpoints.build_model(checkpoints.Checkpoint(tiny, {**state, "surplus": torch.ones(1)}, {}, Path("file")))


# --- Known weights


def test_the_list_is_complete() -> None:
    known = listing.known()
    assert {"small", "whisper-tiny.en", "mediapipe-face-mesh", "crema"} <= set(known)
    for name, entry in known.items():
        assert {"kind", "file", "license", "purpose"} <= set(entry), name
        assert entry["kind"] in {"model", "released", "encoder", "part", "metric", "reference"}, name
        if entry.get("ask"):
            assert {"terms", "page"} <= set(entry), name
        if entry["kind"] != "reference":
            assert re.fullmatch("[0-9a-f]{64}", entry["sha256"]), name


def test_packaged_files_are_the_listed_ones() -> None:
    for name, entry in listing.known().items():
        if entry["kind"] == "reference" or "url" in entry or "archive" in entry:
            continue
        path = listing.ASSETS / entry["file"]
        assert path.stat().st_size == entry["bytes"], name
        assert file_sha256(path) == entry["sha256"], name


def test_list_is_found_in_a_wheel_and_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_checkout = listing.known()
    package = tmp_path / "dheads"
    package.mkdir()
    (package / "weights.toml").write_bytes((ROOT / "weights.toml").read_bytes())
    monkeypatch.setattr(listing, "PACKAGE", package)
    assert listing.known() == in_checkout


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        DheadsError, match="'smal' are neither a file nor a known name; the known names are: crema, small"
    ):
        fetching.resolve("smal")


def test_existing_file_is_taken(saved: Path) -> None:
    assert fetching.resolve(str(saved)) == saved


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, saved: Path) -> Path:
    entry = {"kind": "model", "file": saved.name, "sha256": file_sha256(saved), "bytes": saved.stat().st_size}
    monkeypatch.setattr(listing, "ASSETS", saved.parent)
    monkeypatch.setattr(listing, "known", lambda: {"ours": entry})
    return saved


def test_packaged_weights(packaged: Path) -> None:
    assert fetching.resolve("ours") == packaged


def test_damaged_packaged_weights(packaged: Path) -> None:
    packaged.write_bytes(packaged.read_bytes() + b"x")
    with pytest.raises(DheadsError, match="missing or damaged; reinstall dheads"):
        fetching.resolve("ours")
    packaged.unlink()
    with pytest.raises(DheadsError, match="missing or damaged; reinstall dheads"):
        fetching.resolve("ours")


@pytest.mark.parametrize(
    ("platform", "variable", "value", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "/somewhere", "/somewhere/dheads"),
        ("linux", "XDG_CACHE_HOME", None, "~/.cache/dheads"),
        ("darwin", "XDG_CACHE_HOME", None, "~/Library/Caches/dheads"),
        ("win32", "LOCALAPPDATA", "/local", "/local/dheads"),
        ("linux", "DHEADS_HOME", "~/mine", "~/mine"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, variable: str, value: str | None, expected: str
) -> None:
    for name in ("DHEADS_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(listing.sys, "platform", platform)
    if value is not None:
        monkeypatch.setenv(variable, value)
    assert listing.home() == Path(expected).expanduser()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Config, number: float
) -> None:
    path, tensors = tmp_path / "weights.safetensors", ExtendedUNet(tiny).state_dict()
    tensors["stem.weight"][1, 2] = number
    with pytest.raises(DheadsError, match=r"cannot write .*: stem\.weight holds numbers that are not finite as torch"):
        checkpoints.save_checkpoint(path, tensors, tiny, {})
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_first_not_finite", lambda tensors: None)
        checkpoints.save_checkpoint(path, tensors, tiny, {})
    with pytest.raises(
        DheadsError, match=r"stem\.weight holds numbers that are not finite; take weights of an earlier"
    ):
        checkpoints.load_checkpoint(path)


def test_what_is_too_large_for_half_precision_is_not_written_as_infinite(tmp_path: Path, tiny: Config) -> None:
    path, tensors = tmp_path / "weights.safetensors", ExtendedUNet(tiny).state_dict()
    tensors["stem.weight"][1, 2] = 70_000.0
    checkpoints.save_checkpoint(path, tensors, tiny, {})
    with pytest.raises(DheadsError, match=r"not finite as torch\.float16"):
        checkpoints.save_checkpoint(path, tensors, tiny, {}, torch.float16)
    assert checkpoints.load_checkpoint(path).tensors["stem.weight"].max() == 70_000


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such user list")
def test_a_user_without_a_home_is_asked_to_set_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs under the id of no user."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("DHEADS_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    for ask in (listing.home, lambda: licences.consent("crema"), lambda: fetching.fetch("syncnet", progress=False)):
        with pytest.raises(DheadsError, match="has no home folder to keep weights in; set DHEADS_HOME to a folder"):
            ask()
    assert fetching.fetch("small").is_file(), "packaged weights need no folder"
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path))
    assert listing.home() == tmp_path


# --- Download

CONTENT = bytes(range(256)) * 5_000  # more than one read
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclasses.dataclass
class Server:
    """The behaviour of a server, and the Range headers that it received."""

    url: str
    asked: list[str | None] = dataclasses.field(default_factory=list)
    content: bytes = CONTENT
    content_type: str | None = None
    names_length: bool = True
    stop_after: int | None = None
    knows_ranges: bool = True
    redirect: str | None = None

    def fetch(self, path: Path) -> None:
        download(f"{self.url}/weights.bin", path, SHA256, len(CONTENT), progress=False)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            state.asked.append(asked)
            if state.redirect:
                self.send_response(302)
                self.send_header("Location", state.redirect)
                self.end_headers()
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.knows_ranges else 0
            if asked and start >= len(state.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if state.names_length:
                self.send_header("Content-Length", str(len(state.content) - start))
            if state.content_type:
                self.send_header("Content-Type", state.content_type)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client may stop reading
                self.wfile.write(state.content[start : state.stop_after])

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        state = Server(f"http://127.0.0.1:{running.server_port}")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        running.shutdown()
        thread.join()


def test_download(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "weights.bin"
    server.fetch(path)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.bin"]


def test_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    server.stop_after = 400_000
    with pytest.raises(DheadsError, match="run again to go on") as caught:
        server.fetch(path)
    assert str(path) in str(caught.value)
    assert not path.exists()
    server.stop_after = None
    server.fetch(path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-"]


def test_server_without_ranges_sends_everything_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.with_name("weights.bin.part").write_bytes(b"y" * 1000)
    server.knows_ranges = False
    server.fetch(path)
    assert path.read_bytes() == CONTENT


def test_complete_but_unrenamed_file_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.with_name("weights.bin.part").write_bytes(CONTENT)
    server.fetch(path)
    assert path.read_bytes() == CONTENT
    assert server.asked == []


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT + b"more"], ids=["other bytes", "longer"])
def test_wrong_content_is_removed(server: Server, tmp_path: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(DheadsError, match="not the file that was expected"):
        server.fetch(tmp_path / "weights.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_web_page_is_not_taken_for_the_file(server: Server, tmp_path: Path) -> None:
    unfinished = tmp_path / "weights.bin.part"
    unfinished.write_bytes(CONTENT[:1000])
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(DheadsError, match=r"gives a web page, not the file; run again .*weights\.bin"):
        server.fetch(tmp_path / "weights.bin")
    assert unfinished.read_bytes() == CONTENT[:1000]  # what was received before is kept


def test_a_file_that_is_shorter_than_listed(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:1000]
    for _ in range(2):  # the second time the server has no bytes to add
        with pytest.raises(DheadsError, match="stopped early"):
            server.fetch(tmp_path / "weights.bin")
    assert server.asked == [None, "bytes=1000-"]


def test_endless_answer_is_cut_off(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT * 4
    unfinished = tmp_path / "weights.bin.part"
    receive(f"{server.url}/weights.bin", unfinished, len(CONTENT), "", progress=False)
    assert unfinished.stat().st_size == len(CONTENT) + 1


def test_offline_the_error_names_the_path_for_the_file(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    with pytest.raises(DheadsError, match="put the file there by hand") as caught:
        download(f"http://127.0.0.1:{port}/w", tmp_path / "w", SHA256, 10, progress=False)
    assert str(tmp_path / "w") in str(caught.value)


@pytest.mark.parametrize("url", ["http://example.com/w", "ftp://example.com/w", "file:///etc/hostname", "w"])
def test_only_https(tmp_path: Path, url: str) -> None:
    with pytest.raises(DheadsError, match="over https only"):
        download(url, tmp_path / "w", SHA256, 10, progress=False)


def test_redirect_away_from_https_is_refused(server: Server, tmp_path: Path) -> None:
    server.redirect = "http://example.com/w"
    with pytest.raises(DheadsError, match="over https only"):
        server.fetch(tmp_path / "weights.bin")


def test_cached_file_is_checked_and_fetched_again_when_damaged(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"kind": "model", "file": "w", "url": f"{server.url}/w", "sha256": SHA256, "bytes": len(CONTENT)}
    monkeypatch.setattr(listing, "known", lambda: {"far": entry})
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path))
    assert fetching.resolve("far", progress=False) == tmp_path / "w"
    assert fetching.resolve("far", progress=False) == tmp_path / "w"
    assert len(server.asked) == 1
    (tmp_path / "w").write_bytes(b"damaged")
    assert fetching.resolve("far", progress=False).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_a_second_process_waits_for_the_same_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished file has a fixed name, so that a later run can continue it; two at once would corrupt it."""
    entry = {"kind": "model", "file": "w", "url": f"{server.url}/w", "sha256": SHA256, "bytes": len(CONTENT)}
    monkeypatch.setattr(listing, "known", lambda: {"far": entry})
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path / "new"))
    waiting = threading.Event()

    def slow(*args: object, **options: object) -> None:
        other.start()
        assert waiting.wait(timeout=20)
        download(*args, **options)

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert record.getMessage() == f"waiting for another process, which is downloading to {tmp_path / 'new'}"
            waiting.set()

    other = threading.Thread(target=fetching.fetch, args=("far", False))
    monkeypatch.setattr(fetching, "download", slow)
    logging.getLogger("dheads").addHandler(Waiting())
    logging.getLogger("dheads").setLevel(logging.INFO)
    assert fetching.fetch("far", progress=False).read_bytes() == CONTENT
    other.join(timeout=20)
    assert not other.is_alive()
    assert len(server.asked) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "w"]


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path / "file"))
    with pytest.raises(DheadsError, match=r"cannot write to .*file: .*; set DHEADS_HOME to another folder"):
        fetching.fetch("syncnet", progress=False)


def test_metadata_is_readable_by_others(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        texts = file.metadata()
    assert texts["format"] == "dheads-1"
    assert json.loads(texts["info"]) == INFO
    assert configuration.from_dict(json.loads(texts["config"])) == configuration.preset("tiny")
