"""The recipe that packs a prepared dataset into parts and unpacks it."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
import runpy
import shutil
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT
from real_data import Prepared
from safetensors.torch import load, load_file, save
from typer.testing import CliRunner

from dheads.config import SAMPLE_RATE, preset
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip, clip_path, write_clips
from dheads.errors import DheadsError
from dheads.media.sound import SAMPLES_PER_FRAME, load_waveform
from dheads.media.writing import write_clip
from dheads.speech.encoders import load_speech_encoder
from dheads.training.batches import Batches

pytest_plugins = "real_data"

PROGRAM = ROOT / "recipes" / "pack_data.py"
VOICE = "s1/grid_one"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """recipes/pack_data.py"""
    spec = importlib.util.spec_from_file_location("pack_data", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Sent:
    data: Dataset
    parts: Path
    unpacked: Dataset


@pytest.fixture(scope="module")
def sent(recipe: ModuleType, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """The real clips, packed with the default options."""
    root = tmp_path_factory.mktemp("sent")
    recipe.pack(prepared.data, root / "parts")
    recipe.unpack([root / "parts"], root / "data", "cpu")
    return Sent(Dataset(prepared.data), root / "parts", Dataset(root / "data"))


@pytest.fixture(scope="module")
def parts(recipe: ModuleType, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with all voices, in several parts."""
    folder = tmp_path_factory.mktemp("several") / "parts"
    recipe.pack(prepared.data, folder, part_mb=0.08, voices="all")
    return folder


def labels_of(dataset: Dataset, clip: Clip) -> dict[str, torch.Tensor]:
    return load_file(clip_path(dataset.root, clip.clip, "safetensors"))


def sound_of(dataset: Dataset, clip: Clip) -> np.ndarray:
    return load_waveform(clip_path(dataset.root, clip.clip, "mp4")).numpy()


# --- What arrives


def test_tables_are_unchanged(sent: Sent) -> None:
    assert [part.name for part in sent.parts.iterdir()] == ["data-1-of-1.zip"]
    for name in ("dataset.toml", "clips.csv"):
        assert (sent.unpacked.root / name).read_bytes() == (sent.data.root / name).read_bytes()
    assert sorted(path.name for path in sent.unpacked.root.iterdir()) == ["clips", "clips.csv", "dataset.toml"]
    assert sent.unpacked.clips == sent.data.clips
    assert len(sent.data.clips) == 6


def test_pictures_look_the_same(sent: Sent) -> None:
    for clip in sent.data.clips:
        error = sent.unpacked.frames(clip).astype(float) - sent.data.frames(clip)
        psnr = 10 * np.log10(255**2 / (error**2).mean(axis=(1, 2, 3)))
        assert psnr.mean() > 40, clip.clip


def test_labels_are_exact_or_their_fp16(sent: Sent) -> None:
    for clip in sent.data.clips:
        wanted, got = labels_of(sent.data, clip), labels_of(sent.unpacked, clip)
        assert {name: (label.dtype, label.shape) for name, label in got.items()} == {
            name: (label.dtype, label.shape) for name, label in wanted.items()
        }
        assert torch.equal(got["mouth_box"], wanted["mouth_box"])
        for name in ("landmarks", "lips", "eyes"):
            assert torch.equal(got[name], wanted[name].half().float())
        assert (got["landmarks"] - wanted["landmarks"]).abs().max() <= 2**-7  # px, of 32


def test_sound_keeps_its_timing(sent: Sent) -> None:
    for clip in sent.data.clips:
        wanted, got = sound_of(sent.data, clip), sound_of(sent.unpacked, clip)
        assert abs(len(got) - len(wanted)) <= 1
        assert len(got) <= clip.frames * SAMPLES_PER_FRAME
        if clip.frames > 1:
            size = 2 * len(wanted)
            spectrum = np.fft.rfft(got, size) * np.fft.rfft(wanted, size).conj()
            lag = np.fft.irfft(spectrum, 16 * size).argmax()  # in sixteenths of a sample
            assert min(lag, 16 * size - lag) / 16 < 1e-4 * SAMPLE_RATE, clip.clip
            assert np.corrcoef(got[: len(wanted)], wanted[: len(got)])[0, 1] > 0.9


def test_voices_that_are_not_packed_are_encoded_from_the_unpacked_sound(sent: Sent) -> None:
    encoder = load_speech_encoder("whisper-tiny.en")
    clip = next(clip for clip in sent.data.clips if clip.clip == VOICE)
    wanted, got = labels_of(sent.data, clip), labels_of(sent.unpacked, clip)
    sound = torch.from_numpy(sound_of(sent.unpacked, clip))
    torch.testing.assert_close(got["speech"].float(), encoder.encode(sound, clip.frames), atol=0.02, rtol=0.01)
    at_tempo = encoder.encode_at(1.1, sound, clip.frames)
    torch.testing.assert_close(got["speech_at_tempos"][0].float(), at_tempo, atol=0.02, rtol=0.01)
    for name in ("speech", "speech_at_tempos"):
        error = (got[name].float() - wanted[name].float()).square().mean() / wanted[name].float().square().mean()
        assert error.sqrt() < 0.3  # the loss of Opus


def test_it_can_be_trained_on(sent: Sent) -> None:
    config = preset("tiny")
    sent.unpacked.check(config)
    batches = Batches(sent.unpacked, sent.unpacked.split("train"), config)
    batch = batches.batch(0, 0)
    assert batch.target.shape == (4, 3, 32, 32)
    assert batch.cues.audio_window.isfinite().all()
    assert not batches.broken


@pytest.mark.parametrize("voices", ["own", "all"])
def test_packed_voices_are_exact(
    recipe: ModuleType, prepared: Prepared, parts: Path, tmp_path: Path, voices: str
) -> None:
    folder = parts
    if voices == "own":
        folder = tmp_path / "parts"
        recipe.pack(prepared.data, folder, voices=voices)
    recipe.unpack([folder], tmp_path / "data")
    data, unpacked = Dataset(prepared.data), Dataset(tmp_path / "data")
    for clip in data.clips:
        wanted, got = labels_of(data, clip), labels_of(unpacked, clip)
        assert torch.equal(got["speech"], wanted["speech"])
        assert ("speech_at_tempos" in got) == (clip.frames > 1)
        if clip.frames > 1:
            assert torch.equal(got["speech_at_tempos"], wanted["speech_at_tempos"]) == (voices == "all")


def test_an_unpacked_dataset_can_be_packed_without_loss_of_labels(
    recipe: ModuleType, sent: Sent, tmp_path: Path
) -> None:
    recipe.pack(sent.unpacked.root, tmp_path / "parts", voices="all")
    recipe.unpack([tmp_path / "parts"], tmp_path / "data")
    for clip in sent.data.clips:
        names = [clip_path(root, clip.clip, "safetensors") for root in (sent.unpacked.root, tmp_path / "data")]
        assert names[0].read_bytes() == names[1].read_bytes()


def test_all_16_bit_numbers_are_packed_exactly(recipe: ModuleType) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    boxes = every.view(-1, 4)
    assert torch.equal(recipe._unpacked("mouth_box", recipe._packed("mouth_box", boxes)), boxes)
    for name, shape in {"speech": (128, 512), "speech_at_tempos": (2, 64, 512), "eyes": (2**16,)}.items():
        floats = every.view(torch.float16).view(shape)
        again = recipe._unpacked(name, recipe._packed(name, floats))
        assert torch.equal(again.view(torch.int16), floats.view(torch.int16))


# --- Parts


def test_parts_are_small_numbered_and_complete(recipe: ModuleType, prepared: Prepared, parts: Path) -> None:
    paths = sorted(parts.iterdir())
    assert len(paths) > 2
    assert [path.name for path in paths] == [f"data-{k}-of-{len(paths)}.zip" for k in range(1, len(paths) + 1)]
    names: list[str] = []
    for path in paths:
        assert path.stat().st_size < 80_000
        names += [name for name in zipfile.ZipFile(path).namelist() if name.startswith("clips/")]
    assert len(names) == len(set(names)) == 12


def test_the_size_of_a_part_is_known_in_advance(recipe: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(5):
        entries = {f"clips/é{k}/{'a' * k}": rng.bytes(int(rng.integers(20_000))) for k in range(20)}
        with zipfile.ZipFile(tmp_path / f"{number}", "w") as archive:
            recipe._add(archive, {"dataset.toml": b"a" * 5000})
            most = recipe._size_with(archive, entries)
            recipe._add(archive, entries)
            exact = recipe._size_with(archive, {})
        assert (tmp_path / f"{number}").stat().st_size == exact
        assert exact <= most < 1.01 * exact + 64 * 20


def test_a_clip_too_large_for_a_part_is_refused(recipe: ModuleType, prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match=r"clips/.*\.mp4 does not fit into a part; give a larger --part-mb"):
        recipe.pack(prepared.data, tmp_path / "parts", part_mb=0.003)
    assert not list(tmp_path.iterdir())


def test_the_same_data_gives_the_same_parts(
    recipe: ModuleType, prepared: Prepared, parts: Path, tmp_path: Path
) -> None:
    recipe.pack(prepared.data, tmp_path / "parts", part_mb=0.08, voices="all")
    for path in parts.iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_a_dataset_without_clips_is_refused(recipe: ModuleType, prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(prepared.data / "dataset.toml", tmp_path / "data")
    write_clips(tmp_path / "data", [])
    with pytest.raises(DheadsError, match="data: holds no clip; prepare some first"):
        recipe.pack(tmp_path / "data", tmp_path / "parts")


def test_existing_folders_are_not_overwritten(
    recipe: ModuleType, prepared: Prepared, parts: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    for command in (
        lambda: recipe.pack(prepared.data, tmp_path / "mine"),
        lambda: recipe.unpack([parts], tmp_path / "mine"),
        lambda: recipe.pack(prepared.data, tmp_path),
    ):
        with pytest.raises(DheadsError, match="exists already; delete it or choose another name"):
            command()
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_commands(recipe: ModuleType, prepared: Prepared, tmp_path: Path) -> None:
    options = ["--voices", "all", "--part-mb", "0.08"]
    packed = CliRunner().invoke(recipe.app, ["pack", str(prepared.data), str(tmp_path / "parts"), *options])
    paths = sorted((tmp_path / "parts").iterdir())
    assert (packed.exit_code, packed.stdout.split()) == (0, [str(path) for path in paths])
    assert "6/6" in packed.stderr
    done = CliRunner().invoke(recipe.app, ["unpack", *map(str, paths), str(tmp_path / "data")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'data'}\n")
    assert Dataset(tmp_path / "data").clips == Dataset(prepared.data).clips


def test_an_error_is_one_line(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted(parts.iterdir())
    monkeypatch.setattr(sys, "argv", list(map(str, [PROGRAM, "unpack", *paths[1:], tmp_path / "data"])))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert ended.value.code == (
        f"error: {paths[1]}: parts are missing: data-1-of-{len(paths)}.zip; copy them there too"
    )


# --- Parts that are missing, damaged or hostile


@pytest.fixture
def copied(parts: Path, tmp_path: Path) -> Path:
    shutil.copytree(parts, tmp_path / "parts")
    return tmp_path / "parts"


def rewrite(part: Path, name: str, content: bytes | None) -> None:
    """Replace the content of an entry of a part, or remove it."""
    with zipfile.ZipFile(part) as archive:
        entries = {known: archive.read(known) for known in archive.namelist()} | {name: content}
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for known, there in entries.items():
            if there is not None:
                archive.writestr(known, there)


def part_with(folder: Path, name: str) -> tuple[Path, bytes]:
    for part in sorted(folder.iterdir()):
        with zipfile.ZipFile(part) as archive:
            if name in archive.namelist():
                return part, archive.read(name)
    raise KeyError(name)


def refused(recipe: ModuleType, given: list[Path], said: str) -> None:
    """Unpacking fails with one sentence, and leaves no files."""
    target = given[0].parent / "unpacked"
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(DheadsError, match=said) as caught:
        recipe.unpack(given, target, "cpu")
    assert "\n" not in str(caught.value)
    assert not re.search(r"\.[0-9a-f]{8}\.part", str(caught.value))  # the temporary folder
    assert sorted(target.parent.rglob("*")) == before


def test_missing_parts_are_named(recipe: ModuleType, copied: Path) -> None:
    count = len(list(copied.iterdir()))
    for number in (1, count):
        (copied / f"data-{number}-of-{count}.zip").unlink()
    said = rf"parts are missing: data-1-of-{count}\.zip, data-{count}-of-{count}\.zip; copy them there too"
    refused(recipe, [copied], said)
    for path in copied.iterdir():
        path.unlink()
    refused(recipe, [copied], "parts of one dataset are wanted, found are: none")


def test_files_that_are_no_parts_are_refused_if_given_and_ignored_in_folders(recipe: ModuleType, copied: Path) -> None:
    other = copied / "notes.txt"
    other.write_text("hello")
    refused(recipe, [other], r"notes\.txt: is not named as a part is, such as data-1-of-3\.zip")
    refused(recipe, [copied / "data-9-of-9.zip"], "parts are missing: data-1-of-9.zip, ")
    recipe.unpack([copied], copied.parent / "unpacked", "cpu")


def test_parts_of_two_datasets_are_refused(recipe: ModuleType, sent: Sent, copied: Path) -> None:
    count = len(list(copied.iterdir()))
    shutil.copy(sent.parts / "data-1-of-1.zip", copied)
    refused(recipe, [copied], rf"found are: data \(of 1\), data \(of {count}\); give one folder of parts")
    (copied / "data-1-of-1.zip").unlink()
    last = copied / f"data-{count}-of-{count}.zip"
    with zipfile.ZipFile(last) as archive:
        rewrite(last, "clips.csv", archive.read("clips.csv").replace(b",train,", b",val,"))
    refused(recipe, [copied], r"zip: it is of another dataset than .*data-1-of-")
    shutil.copy(copied / f"data-1-of-{count}.zip", last)  # under a wrong name
    refused(recipe, [copied], "is no file of a clip in its table, or there twice")


def test_a_damaged_part_is_named(recipe: ModuleType, copied: Path) -> None:
    last = sorted(copied.iterdir())[-1]
    content = last.read_bytes()
    for damaged in (b"", b"PK", content[: len(content) // 2], content[:-1], bytes(len(content))):
        last.write_bytes(damaged)
        refused(recipe, [copied], rf"{last.name}: is no whole part \(.*\); copy it again")
    position = content.index(b".mp4") + 400
    last.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
    refused(recipe, [copied], rf"{last.name}: clips/.*\.mp4 cannot be read \(.*\); copy the part again")


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_one_sentence(recipe: ModuleType, copied: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = sorted(copied.iterdir())[-1]
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\1\2")
    for position in rng.integers(directory, len(content), size=3):
        content[position] ^= int(rng.integers(1, 256))
    path.write_bytes(content)
    said = None
    try:
        recipe.unpack([copied], copied.parent / "unpacked", "cpu")
    except DheadsError as error:
        said = str(error)
    assert said is None or str(copied) in said
    assert sorted(one.name for one in copied.parent.iterdir()) == ["parts", *(["unpacked"] if said is None else [])]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            b"s1/grid_one,",
            b"../../grid_one,",
            r"its table cannot be read: clips\.csv: '\.\./\.\./grid_one' is not",
        ),
        (b"s1/grid_one,", b"/tmp/grid_one,", r"its table cannot be read: clips\.csv: '/tmp/grid_one' is not a valid"),
        (b"s1/grid_one,", b"s1/another,", "is no file of a clip in its table"),
        (b",train,25,", b",train,24,", "grid_one cannot be read"),
        (b",train,25,", b",train,26,", "grid_one cannot be read"),
        (b",train,25,", b",train,1000000000,", "grid_one cannot be read"),
        (b",train,25,", b",train,many,", "its table cannot be read"),
    ],
)
def test_a_wrong_table_is_refused(recipe: ModuleType, copied: Path, old: bytes, new: bytes, said: str) -> None:
    for part in copied.iterdir():
        with zipfile.ZipFile(part) as archive:
            table = archive.read("clips.csv")
        rewrite(part, "clips.csv", table.replace(old, new, 1))
    refused(recipe, [copied], said)


TEMPOS = b"speech_tempos = [\n    1.1,\n]"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"size = 32", b"size = 64", "frame 0 is damaged, or not of 64 x 64 px|mouth_box|cannot be read"),
        (b"format = ", b"format = 9", "its table cannot be read"),
        (TEMPOS, b"speech_tempos = [0.0001]", "speech_tempos is 0.0001, but must be 0.5 to 2"),
        (TEMPOS, b"speech_tempos = [1.1, 1.2]", "it has other tempos than its table"),
        (b"[preparation]", b"[[preparation]]", "its table cannot be read"),
    ],
)
def test_wrong_facts_of_the_dataset_are_refused(
    recipe: ModuleType, copied: Path, old: bytes, new: bytes, said: str
) -> None:
    for part in copied.iterdir():
        with zipfile.ZipFile(part) as archive:
            facts = archive.read("dataset.toml")
        assert old in facts
        rewrite(part, "dataset.toml", facts.replace(old, new, 1))
    refused(recipe, [copied], said)


def video(path: Path, size: int, frames: int, sound: int) -> bytes:
    pictures = [np.full((size, size, 3), 90, np.uint8)] * frames
    write_clip(path, pictures, torch.zeros(sound), x264_options={}, opus_kbps=32)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("size", "frames", "sound", "said"),
    [
        (64, 25, 16_000, "frame 0 is damaged, or not of 32 x 32 px"),
        (32, 24, 16_000, "does not hold 25 frames"),
        (32, 26, 16_000, "does not hold 25 frames"),
        (32, 25, 15_000, "holds 15[0-9]+ samples of sound instead of 16000"),
    ],
)
def test_another_video_is_refused(
    recipe: ModuleType, copied: Path, size: int, frames: int, sound: int, said: str
) -> None:
    name = f"clips/{VOICE}.mp4"
    rewrite(part_with(copied, name)[0], name, video(copied.parent / "made.mp4", size, frames, sound))
    refused(
        recipe, [copied], rf"{VOICE} cannot be read: its video:? {said}; copy the part again, or pack the data again"
    )


Edit = Callable[[dict[str, torch.Tensor]], bytes]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda labels: b"{}", "grid_one cannot be read"),
        (lambda labels: save({k: v for k, v in labels.items() if k != "eyes"}), "grid_one cannot be read: 'eyes'"),
        (lambda labels: save(labels | {"eyes": labels["eyes"].float()}), "eyes is not stored as pairs of bytes"),
        (lambda labels: save(labels | {"eyes": labels["eyes"][:1]}), "eyes is not stored as pairs of bytes"),
        (lambda labels: save(labels | {"eyes": torch.tensor(1, dtype=torch.uint8)}), "eyes is not stored as"),
        (lambda labels: save(labels | {"eyes": labels["eyes"][:, 1:].contiguous()}), r"eyes is of shape \(24,\)"),
        (lambda labels: save(labels | {"mouth_box": labels["mouth_box"] * 0}), "mouth_box lies outside the picture"),
        (lambda labels: save(labels | {"lips": torch.full((2, 25, 3), 127, dtype=torch.uint8)}), "not finite"),
        (lambda labels: bytes(2**24), "grid_one.safetensors is far too large"),
        (lambda labels: None, "neither it nor the other parts hold clips/s1/grid_one.safetensors"),
    ],
)
def test_other_labels_are_refused(recipe: ModuleType, copied: Path, edit: Edit, said: str) -> None:
    name = f"clips/{VOICE}.safetensors"
    part, content = part_with(copied, name)
    rewrite(part, name, edit(load(content)))
    refused(recipe, [copied], said)


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "clips/../../evil.mp4", "clips/s1/evil.mp4"])
def test_files_of_no_clip_are_refused(recipe: ModuleType, copied: Path, name: str) -> None:
    rewrite(sorted(copied.iterdir())[0], name, b"evil")
    refused(recipe, [copied], f"'{name}' is no file of a clip in its table")


def test_an_entry_is_not_unpacked_beyond_its_stated_size(recipe: ModuleType, tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(2**27))
    content = file.getvalue()
    directory = content.index(b"PK\1\2")
    wrong = content[: directory + 24] + (1000).to_bytes(4, "little") + content[directory + 28 :]  # its size
    (tmp_path / "data-1-of-1.zip").write_bytes(wrong)
    with zipfile.ZipFile(tmp_path / "data-1-of-1.zip") as archive:
        tracemalloc.start()
        try:
            with pytest.raises(DheadsError, match="bomb cannot be read"):
                recipe._read(archive, "bomb", 2000)
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()


def test_other_kinds_of_compression_are_refused(recipe: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"a")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, pytest.raises(DheadsError, match="packed in another way"):
        recipe._read(archive, "a", 10)
