"""The authors' released models, replaced by small files of the same form: licence, archive, network, video."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_weights import Server, server  # noqa: F401 (a fixture)
from torch import Tensor, nn
from typer.testing import CliRunner

from dheads import cli
from dheads import config as configuration
from dheads.conditioning import Condition, Cues
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet
from dheads.faces import landmarks
from dheads.faces.alignment import mean_face
from dheads.media.reading import read_frames
from dheads.sampling import talker
from dheads.speech.encoders import load_speech_encoder
from dheads.weights import archives, checkpoints, fetching, licences, listing
from dheads.weights.released import config_from_released
from dheads.weights.torchscript import load_script

PAGE = "https://example.com/view"
NETWORK, ENCODER = "crema_script.pt", "audio_encoder.pt"


# --- Files of the released form


class Node(nn.Module):
    """A module that holds parameters and submodules under the released names."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Recurrent(nn.Module):
    """Called as the released encoder, with embeddings of 32 numbers for the small network."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 8, 400, stride=400)
        self.gru = nn.GRU(8, 256, 2, batch_first=True)
        self.out = nn.Linear(256, 32)

    def forward(self, window: Tensor, lengths: Tensor, init_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if window.dim() != 3 or int(lengths[0]) != window.size(2):
            raise ValueError("not called as the released encoder")
        heard, state = self.gru(self.front(window).transpose(1, 2), init_state)
        return self.out(heard[:, -1]), lengths, state


def scripted(module: nn.Module) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.(script|save)` is deprecated", FutureWarning)
        torch.jit.save(torch.jit.script(module.eval()), file)
    return file.getvalue()


def tree(state: dict[str, Tensor]) -> nn.Module:
    root = Node()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]
        node.register_parameter(leaf, nn.Parameter(tensor))
    return root


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and network arguments of a small network that the released code computed with."""
    prefix = "attn_low."
    with safe_open(shared / "golden" / "official_unet_and_diffusion.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        tensors = {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
        return tensors, json.loads(file.metadata()[prefix + "config"])


@pytest.fixture(scope="module")
def files(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> dict[str, bytes]:
    torch.manual_seed(0)
    state = {name.removeprefix("state."): t for name, t in golden[0].items() if name.startswith("state.")}
    return {NETWORK: scripted(tree(state)), ENCODER: scripted(Recurrent())}


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def table(
    files: dict[str, bytes],
    golden: tuple[dict[str, Tensor], dict[str, Any]],
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> dict[str, dict[str, Any]]:
    """weights.toml with the small files, which the server has in an archive; the cache folder is empty."""
    table = {name: listing.known()[name] for name in ("small", "crema", "diffused-heads")}
    for name, file in (("crema", NETWORK), ("diffused-heads", ENCODER)):
        content = files[file]
        table[name] |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        table[name] |= {"archive": f"{server.url}/checkpoints", "page": PAGE}
    table["crema"]["network"] = golden[1]
    server.content = zipped({"checkpoints/readme.txt": b"hello", **{f"checkpoints/{n}": c for n, c in files.items()}})
    monkeypatch.setattr(listing, "known", lambda: table)
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path / "cache"))
    return table


@pytest.fixture
def accepted(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    licences.accept("crema")
    return table


def cached() -> dict[str, bytes]:
    folder = listing.home()
    others = {"accepted.json", ".lock"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in others}


def fetch(name: str = "crema") -> Path:
    return fetching.fetch(name, progress=False)


def refuse(reason: str) -> str:
    """Fetching raises a one-line error with the reason, the page to get the files from and the paths to put them at."""
    with pytest.raises(DheadsError, match=reason) as caught:
        fetch()
    text = str(caught.value)
    assert "\n" not in text
    for needed in (PAGE, str(listing.home() / NETWORK), str(listing.home() / ENCODER)):
        assert needed in text
    return text


# --- Licence


def test_the_licence_is_asked_for_once(table: dict[str, dict[str, Any]], server: Server) -> None:  # noqa: F811
    text = licences.consent("crema")
    for part in ("CC-BY-NC-SA-4.0", "non-commercial use only", PAGE):
        assert part in text
    with pytest.raises(DheadsError, match=r"CC-BY-NC-SA-4\.0.*run again with --accept-license to accept"):
        fetch()
    assert server.asked == []
    licences.accept("crema")
    assert licences.consent("crema") is None
    assert licences.consent("diffused-heads") is None  # the same licence and source
    assert fetch().read_bytes()
    assert licences.consent("small") is None
    assert licences.consent("no such name") is None


def test_a_licence_that_changes_is_asked_for_again(accepted: dict[str, dict[str, Any]]) -> None:
    accepted["crema"]["license"] = "CC-BY-NC-ND-4.0"
    assert "CC-BY-NC-ND-4.0" in licences.consent("crema")
    licences.accept("crema")
    assert licences.consent("crema") is None


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b"\xff", b'"yes"'])
def test_an_unreadable_record_asks_again(accepted: dict[str, dict[str, Any]], content: bytes) -> None:
    (listing.home() / "accepted.json").write_bytes(content)
    assert licences.consent("crema") is not None
    licences.accept("crema")
    assert licences.consent("crema") is None
    assert os.listdir(listing.home()) == ["accepted.json"]


def test_a_checkpoint_asks_for_its_speech_encoder(table: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for preset, asks in (("tiny", False), ("crema", True)):
        checkpoints.save_checkpoint(path, {"a": torch.ones(1)}, configuration.preset(preset), {})
        assert (licences.consent(str(path)) is not None) == asks
    licences.accept(str(path))
    assert licences.consent(str(path)) is None
    path.write_bytes(b"something else")
    assert licences.consent(str(path)) is None


def test_acceptance_that_cannot_be_remembered(table: dict[str, dict[str, Any]]) -> None:
    listing.home().write_text("in the way")
    with pytest.raises(DheadsError, match=r"cannot write .*accepted\.json"):
        licences.accept("crema")


# --- Archive


def test_both_files_come_with_one_download(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    assert fetch() == listing.home() / NETWORK
    assert fetch("diffused-heads") == listing.home() / ENCODER
    assert fetching.resolve("crema", progress=False) == listing.home() / NETWORK
    assert server.asked == [None]
    assert cached() == files


def test_a_compressed_archive_of_unnamed_length(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    server.content, server.names_length = zipped(files, zipfile.ZIP_DEFLATED), False
    fetch()
    assert cached() == files


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_download_goes_on(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
    knows_ranges: bool,
) -> None:
    server.stop_after, server.knows_ranges = 100_000, knows_ranges
    refuse("stopped early; run again to go on")
    server.stop_after = None
    fetch()
    assert server.asked == [None, "bytes=100000-"]
    assert cached() == files


def test_a_download_that_was_complete_already(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    (listing.home() / "crema_script.zip.part").write_bytes(server.content)
    fetch()
    assert server.asked == [f"bytes={len(server.content)}-"]
    assert cached() == files


def test_an_unfinished_file_that_is_longer_than_the_whole(accepted: dict[str, Any], server: Server) -> None:  # noqa: F811
    (listing.home() / "crema_script.zip.part").write_bytes(server.content + b"more")
    refuse("gives more than the archive that was expected, so it was removed")
    assert fetch().is_file()


def test_an_endless_archive_is_cut_off(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archives, "_LARGEST_ARCHIVE", 100_000)
    for server.names_length in (True, False):
        refuse("gives more than the archive that was expected, so it was removed")
        assert cached() == {}


def test_a_page_instead_of_the_archive(accepted: dict[str, dict[str, Any]], server: Server) -> None:  # noqa: F811
    server.content, server.content_type = b"<!DOCTYPE html>Quota exceeded", "text/html; charset=utf-8"
    refuse("gives a web page, not the file; run again to go on, or get the archive at")
    assert cached() == {}


@pytest.mark.parametrize("content", [b"<html>no type</html>", b"Rar!\x1a\x07\x01\x00" + bytes(999), b"PK\x03\x04", b""])
def test_something_else_than_a_zip_archive_is_kept_to_be_looked_at(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    content: bytes,
) -> None:
    server.content = content
    for _ in range(2):
        assert "crema_script.zip" in refuse("is not the zip archive that was expected: delete it and get")
    assert cached() == {"crema_script.zip": content}
    assert server.asked == [None]  # it is not fetched again


def damaged(files: dict[str, bytes], name: str) -> bytes:
    return files[name][:-1] + bytes([files[name][-1] ^ 1])


def test_a_file_with_the_wrong_hash(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    server.content = zipped({NETWORK: damaged(files, NETWORK), ENCODER: files[ENCODER]})
    with pytest.raises(DheadsError, match=r"holds no crema_script\.pt of the right size and sha256, so it was removed"):
        fetch()
    assert cached() == {ENCODER: files[ENCODER]}


def test_a_file_that_is_missing(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    server.content = zipped({f"{NETWORK}/x": b"", f"{NETWORK}.txt": files[NETWORK], f"a{ENCODER}": files[ENCODER]})
    refuse("holds no crema_script.pt or audio_encoder.pt of the right size")
    assert cached() == {}


def test_the_right_one_of_two_members_of_a_name(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    members = {f"old/{NETWORK}": damaged(files, NETWORK), f"new/{NETWORK}": files[NETWORK], ENCODER: files[ENCODER]}
    server.content = zipped(members)
    fetch()
    assert cached() == files


def test_members_come_into_the_cache_wherever_they_claim_to_lie(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    server.content = zipped(
        {f"../../{NETWORK}": files[NETWORK], f"C:\\somewhere\\{ENCODER}": files[ENCODER], "../evil": b"x"}
    )
    fetch()
    assert cached() == files
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_member_that_is_larger_than_listed_is_not_unpacked(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bomb = bytes(20_000_000)
    server.content = zipped({NETWORK: bomb, ENCODER: bomb}, zipfile.ZIP_DEFLATED)
    refuse("of the right size")
    # The same with false sizes in the headers.
    size = len(bomb).to_bytes(4, "little")
    for name in (NETWORK, ENCODER):
        server.content = zipped({name: bomb}, zipfile.ZIP_DEFLATED).replace(
            size, len(files[name]).to_bytes(4, "little")
        )
        with pytest.raises(DheadsError, match=f"no .*{name}.* of the right size"):
            fetch()
    assert cached() == {}


def test_a_damaged_and_an_encrypted_member(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    for broken in (spoil(zipped(files)), spoil(zipped(files, zipfile.ZIP_DEFLATED)), mark_encrypted(zipped(files))):
        server.content = broken
        refuse("of the right size")
        assert cached() == {}


def spoil(archive: bytes) -> bytes:
    """The archive with bytes inside the members changed, but not their headers."""
    with zipfile.ZipFile(io.BytesIO(archive)) as bundle:
        middles = [m.header_offset + 100 + m.compress_size // 2 for m in bundle.infolist()]
    content = bytearray(archive)
    for middle in middles:
        content[middle : middle + 50] = bytes(50)
    return bytes(content)


def mark_encrypted(archive: bytes) -> bytes:
    content = bytearray(archive)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = content.find(signature)
        while position >= 0:
            content[position + flags] |= 1
            position = content.find(signature, position + 1)
    return bytes(content)


def test_offline(accepted: dict[str, dict[str, Any]]) -> None:
    with HTTPServer(("127.0.0.1", 0), object) as closed:  # type: ignore[arg-type]
        port = closed.server_port
    for name in ("crema", "diffused-heads"):
        accepted[name]["archive"] = f"http://127.0.0.1:{port}/checkpoints"
    refuse("cannot download .*; run again to go on, or get the archive at")


def test_files_put_there_by_hand(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    for name, content in files.items():
        (listing.home() / name).write_bytes(content)
    assert fetch() == listing.home() / NETWORK
    assert fetch("diffused-heads") == listing.home() / ENCODER
    assert server.asked == []


def test_a_damaged_file_is_fetched_again_and_a_good_one_left_alone(
    accepted: dict[str, dict[str, Any]],
    server: Server,  # noqa: F811
    files: dict[str, bytes],
) -> None:
    (listing.home() / ENCODER).write_bytes(files[ENCODER])
    before = (listing.home() / ENCODER).stat()
    (listing.home() / NETWORK).write_bytes(damaged(files, NETWORK))
    fetch()
    assert cached() == files
    assert (listing.home() / ENCODER).stat().st_mtime_ns == before.st_mtime_ns
    assert len(server.asked) == 1


# --- Network


def test_the_listed_network_has_as_many_bytes_as_its_file() -> None:
    entry = listing.known()["crema"]
    with torch.device("meta"):
        unet = ExtendedUNet(config_from_released(entry["network"]))
    tensors = 4 * sum(parameter.numel() for parameter in unet.parameters())
    assert 0 < entry["bytes"] - tensors < 1_000_000  # the rest is code and names


def test_our_network_computes_what_the_released_one_did(
    accepted: dict[str, dict[str, Any]], golden: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet, config, info = checkpoints.load_model("crema", progress=False)
    assert (config.sampling.steps, config.sampling.solver) == (100, "ddpm")
    assert config.conditioning.speech_encoder == "diffused-heads"
    assert config.alignment.landmarks == "fan"
    assert info["license"] == "CC-BY-NC-SA-4.0"
    io_ = {name.removeprefix("io."): tensor for name, tensor in golden[0].items() if name.startswith("io.")}
    motion = io_["motion_frames"].unflatten(1, (2, 3))
    with torch.no_grad():
        output = unet(io_["x_t"], io_["t"].long(), Condition(io_["identity"], motion, Cues(io_["audio_window"])))
    ours = torch.cat([output.prediction, output.var_frac], dim=1)
    torch.testing.assert_close(ours, io_["output"], rtol=0, atol=1e-4)


def test_the_released_checkpoint_becomes_one_of_ours(accepted: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint = checkpoints.load("crema", progress=False)
    path = tmp_path / "ours.safetensors"
    checkpoints.save_checkpoint(path, checkpoint.tensors, checkpoint.config, checkpoint.info)
    again = checkpoints.load(str(path))
    assert again.config == checkpoint.config
    assert again.info == checkpoint.info
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())


def test_the_crop_has_the_margins_of_the_authors_tool() -> None:
    face = mean_face(configuration.preset("crema").alignment, 128)
    top, bottom = face[:, 1].min() + 0.5, face[:, 1].max() + 0.5
    assert top / (bottom - top) == pytest.approx(0.336, abs=0.02)
    assert (128 - bottom) / (bottom - top) == pytest.approx(0.155, abs=0.02)


def test_a_torchscript_file_that_the_user_names_is_not_opened(
    accepted: dict[str, dict[str, Any]],
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "read_network", None)
    for name in ("mine.pt", "crema", "model.safetensors"):
        (tmp_path / name).write_bytes(files[NETWORK])
        monkeypatch.chdir(tmp_path)
        for given in (name, str(tmp_path / name)):
            with pytest.raises(DheadsError, match="is no safetensors file"):
                checkpoints.load(given)


def test_a_torchscript_file_that_torch_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(zipped({"x/version": b"999"}))
    with pytest.raises(DheadsError, match="this version of torch cannot open") as caught:
        load_script(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


# --- Video


@pytest.fixture
def inputs(examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A photo and 0.2 s of speech; the packaged landmarks stand for FAN, which is downloaded."""
    monkeypatch.setattr(talker, "load_backend", lambda name: landmarks.load_backend("mesh"))
    speech = tmp_path / "speech.wav"
    samples = (np.sin(np.arange(3200) / 5) * 8000).astype("<i2").tobytes()
    header = b"RIFF" + (36 + len(samples)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    header += b"\1\0\1\0" + (16_000).to_bytes(4, "little") + (32_000).to_bytes(4, "little") + b"\2\0\x10\0"
    speech.write_bytes(header + b"data" + len(samples).to_bytes(4, "little") + samples)
    return examples / "face.jpg", speech


def test_sample_with_the_released_models(
    table: dict[str, dict[str, Any]], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.mp4"
    command = ["sample", *map(str, inputs), "-o", str(output), "--weights", "crema", "--steps", "2", "--device", "cpu"]
    refused = CliRunner().invoke(cli.app, command)
    assert refused.exit_code == 1
    assert "CC-BY-NC-SA-4.0" in refused.stderr
    assert not output.exists()
    done = CliRunner().invoke(cli.app, [*command, "--accept-license"])
    assert (done.exit_code, done.stdout) == (0, f"{output}\n")
    frames = list(read_frames(output))
    assert len(frames) == 5
    first = output.read_bytes()
    assert CliRunner().invoke(cli.app, command).exit_code == 0  # once is enough
    assert output.read_bytes() == first


def test_the_released_encoder(accepted: dict[str, dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = load_speech_encoder("diffused-heads", progress=False)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    speech = encoder.encode(torch.randn(16_000))
    assert (speech.shape, speech.dtype) == ((25, 32), torch.float32)
    assert torch.equal(
        encoder.encode(torch.ones(16_000)), encoder.encode(torch.ones(16_000))
    )  # each starts from the same state
