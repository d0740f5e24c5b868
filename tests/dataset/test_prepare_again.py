"""`dheads prepare` killed and repeated, in shards, with crashing workers and on full disks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from real_data import cut, in_this_process

from dheads.config import override, preset
from dheads.dataset import clip_worker, prepare
from dheads.dataset.clip_worker import Finished, prepare_clip
from dheads.dataset.extraction import Detector, Extract
from dheads.dataset.manifest import Clip, read_clips
from dheads.dataset.sources import Source
from dheads.errors import DheadsError
from dheads.system.distributed import World
from dheads.system.workers import Died

pytest_plugins = "real_data"

TINY = preset("tiny")
DIED = "its worker process died (a crash of the decoder, or out of memory)"


@dataclass
class Whole:
    raw: Path
    data: Path  # the result of one uninterrupted run
    summary: prepare.Summary


@pytest.fixture(scope="module")
def whole(shared: Path, tmp_path_factory: pytest.TempPathFactory, detector: Detector) -> Whole:
    """Four clips of 10 frames and one of 30, and two files that are not videos."""
    root = tmp_path_factory.mktemp("whole")
    grid = shared / "data" / "grid"
    names = {"ann/1": "s1_bbal7s", "ann/2": "s1_bbas3a", "bob/1": "other_lbbc2a", "cy/1": "s4_bbilzs"}
    for name, source in names.items():
        cut(grid / f"{source}.mp4", root / "raw" / f"{name}.mp4", 10)
    cut(grid / "s1_bbal7s.mp4", root / "raw" / "cy" / "long.mp4", 30)
    (root / "raw" / "ann" / "0.mp4").write_text("no video")
    (root / "raw" / "bob" / "9.mp4").write_text("no video either")
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch, detector)
        summary = prepare.prepare(root / "raw", root / "data", TINY, progress=False)
    return Whole(root / "raw", root / "data", summary)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_uninterrupted_run(whole: Whole) -> None:
    summary = whole.summary
    assert (summary.clips, summary.frames, summary.seconds, summary.speakers) == (5, 70, 2.8, 3)
    assert (summary.layout, summary.path) == ("folder", whole.data)
    assert [source for source, _ in summary.failed] == ["ann/0.mp4", "bob/9.mp4"]
    (reason,) = {reason for _, reason in summary.failed}
    assert reason.startswith("it is not a sound or video file: "), "the same for all files"
    assert summary.drops == {reason: 2}


# --- Killed and repeated


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX only")
def test_a_killed_and_repeated_run_leaves_the_same(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    data, first = tmp_path / "data", tmp_path / "data" / "clips" / "ann" / "ann_1.safetensors"
    command = ("-m", "dheads", "prepare", whole.raw, "--out", data, "--preset", "tiny", "--workers", "1", "--quiet")
    running = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, start_new_session=True)
    while not first.exists():
        try:
            running.wait(0.01)
            pytest.fail("it ended before it had made a clip")
        except subprocess.TimeoutExpired:
            continue
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (data / "clips.csv").exists(), "it was not killed in time"
    assert "ann/0.mp4,it is not" in (data / "failed.csv").read_text()
    # Leftovers of a kill during a write, half a row and half a file; and a file that another shard may be writing.
    with (data / "failed.csv").open("a") as file:
        file.write("bob/9.mp4,it is n")
    for name in (".ann_2.mp4.0123abcd.part", ".ann_2.safetensors.0123abcd.part", ".ann_7.mp4.0123abcd.part"):
        (data / "clips" / "ann" / name).touch()
    finished = {path: path.stat().st_mtime_ns for path in data.rglob("*.safetensors")}

    summary = prepare.prepare(whole.raw, data, TINY, progress=False)
    (data / "clips" / "ann" / ".ann_7.mp4.0123abcd.part").unlink()
    assert contents(data) == contents(whole.data), "tables and clips"
    assert (summary.clips, summary.failed, summary.drops) == (5, whole.summary.failed, whole.summary.drops)
    assert "ann/1.mp4" not in tried
    assert "ann/0.mp4" not in tried
    assert len(tried) == 7 - 1 - len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_second_run_does_nothing(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    shutil.copytree(whole.data, tmp_path / "data")
    prepare.prepare(whole.raw, tmp_path / "data", TINY, progress=False)
    assert tried == []
    assert contents(tmp_path / "data") == contents(whole.data)


def test_damaged_or_incomplete_clips_are_prepared_again(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(whole.data, data)
    (data / "clips" / "ann" / "ann_1.mp4").unlink()
    (data / "clips" / "ann" / "ann_2.safetensors").write_bytes(b"\xff" * 100)
    (data / "clips" / "bob" / "bob_1.safetensors").write_bytes(b"")
    prepare.prepare(whole.raw, data, TINY, progress=False)
    assert tried == ["ann/1.mp4", "ann/2.mp4", "bob/1.mp4"]
    assert contents(data) == contents(whole.data)


def test_a_thumbnail_is_left_out_until_it_is_alone(
    whole: Whole, tmp_path: Path, tried: list[str], shared: Path
) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    (raw / "ann").mkdir(parents=True)
    shutil.copy(whole.raw / "ann" / "1.mp4", raw / "ann")
    shutil.copy(shared / "data" / "stills" / "001.jpg", raw / "ann" / "1.jpg")
    (raw / "ann" / "1.txt").touch()
    reason = "has the same name as another file; ann/1.mp4 is taken, so rename it to have both"
    for _ in range(2):
        summary = prepare.prepare(str(raw), str(data), TINY, progress=False)
        assert (summary.clips, summary.failed) == (1, [("ann/1.jpg", reason)])
        assert summary.drops == {"has the same name as another file": 1}
        assert summary.passed_over == {".txt": 1}
        assert (data / "failed.csv").read_text() == f'source,reason\nann/1.jpg,"{reason}"\n'
    assert tried == ["ann/1.mp4"]
    (raw / "ann" / "1.jpg").rename(raw / "ann" / "2.jpg")
    summary = prepare.prepare(raw, data, TINY, progress=False)
    assert (summary.clips, summary.failed, tried) == (2, [], ["ann/1.mp4", "ann/2.jpg"])
    (raw / "ann" / "1.mp4").unlink()
    (raw / "ann" / "2.jpg").rename(raw / "ann" / "1.jpg")
    (data / "failed.csv").write_text(f'source,reason\nann/1.jpg,"{reason}"\n')
    shutil.rmtree(data / "clips")
    summary = prepare.prepare(raw, data, TINY, progress=False)
    assert (summary.clips, summary.failed, tried[2:]) == (1, [], ["ann/1.jpg"])


def test_failures_are_tried_again_when_their_table_is_deleted(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    data, raw = tmp_path / "data", tmp_path / "raw"
    shutil.copytree(whole.data, data)
    shutil.copytree(whole.raw, raw)
    shutil.copy(raw / "ann" / "1.mp4", raw / "ann" / "0.mp4")  # repaired
    (raw / "bob" / "9.mp4").unlink()
    summary = prepare.prepare(raw, data, TINY, progress=False)
    assert tried == []
    assert [source for source, _ in summary.failed] == ["ann/0.mp4"], "a source that was deleted is not listed"
    (data / "failed.csv").unlink()
    summary = prepare.prepare(raw, data, TINY, progress=False)
    assert tried == ["ann/0.mp4"]
    assert (summary.clips, summary.failed) == (6, [])


# --- Shards


def test_shards_in_one_folder_are_the_whole(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    one = prepare.prepare(whole.raw, first, TINY, shard=(1, 2), progress=False)
    assert one.contact_sheet == first / "contact-sheet.1-of-2.png"
    with pytest.raises(DheadsError, match="the clips of shard 2/2 are missing"):
        read_clips(first)
    two = prepare.prepare(whole.raw, second, TINY, shard=(2, 2), progress=False)
    assert len(tried) == len(set(tried)) == 7
    assert (one.clips + two.clips, one.frames + two.frames) == (whole.summary.clips, whole.summary.frames)
    assert sorted(one.failed + two.failed) == whole.summary.failed
    shutil.copytree(second, first, dirs_exist_ok=True)
    assert read_clips(first) == read_clips(whole.data)
    assert contents(first / "clips") == contents(whole.data / "clips")
    assert {path.name for path in first.iterdir()} == {
        *("clips", "dataset.toml", "clips.1-of-2.csv", "clips.2-of-2.csv", "failed.1-of-2.csv", "failed.2-of-2.csv"),
        *("contact-sheet.1-of-2.png", "contact-sheet.2-of-2.png"),
    }


def test_a_shard_may_be_empty(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    summary = prepare.prepare(whole.raw, tmp_path, TINY, shard=(8, 8), progress=False)
    assert (summary.clips, summary.contact_sheet, summary.failed) == (0, None, [])
    assert (tmp_path / "clips.8-of-8.csv").read_text() == "clip,speaker,split,frames,source,offset_ms,sync\n"
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(DheadsError, match=rf"there is no shard {shard[0]}/2; shards count from 1"):
            prepare.prepare(whole.raw, tmp_path / "x", TINY, shard=shard, progress=False)


def test_torchruns_processes_are_shards(
    whole: Whole, tmp_path: Path, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 2, "WORLD_SIZE": 7, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    prepare.prepare(whole.raw, tmp_path, TINY, progress=False)
    assert tried == ["ann/2.mp4"], "the third"
    assert (tmp_path / "clips.3-of-7.csv").exists()
    with pytest.raises(DheadsError, match="--shard and torchrun both divide the work; use one of them"):
        prepare.prepare(whole.raw, tmp_path, TINY, shard=(1, 2), progress=False)


@pytest.mark.parametrize(
    ("device", "landmarks", "gpus", "devices", "count"),
    [
        ("cpu", "fan", 0, ["cpu"], 64),
        ("cuda", "fan", 2, ["cuda:0", "cuda:1"], 8),
        ("cuda", "mesh", 1, ["cuda:0"], 16),
        ("cuda", "mesh", 8, [f"cuda:{k}" for k in range(8)], 64),
    ],
)
def test_workers_by_cores_and_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, landmarks: str, gpus: int, devices: list[str], count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    config, alone = override(TINY, {"alignment": {"landmarks": landmarks}}), World()
    assert prepare._devices(device, alone) == devices
    assert prepare._worker_count(config, devices, alone) == count


def test_under_torchrun_each_process_has_its_gpu_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    here = World(rank=11, size=16, local_rank=3, local_size=8)
    assert prepare._devices("cuda", here) == ["cuda:3"]
    assert prepare._worker_count(TINY, ["cpu"], here) == 8


# --- Crashes


def crashing(start: object, todo: list[Source], count: int) -> Iterator[tuple[Source, Finished | type[Died]]]:
    """The results of worker processes of which one source kills each that tries it."""
    for source in todo:
        yield source, Died if source.name == "ann/2.mp4" else Finished(7, None)


def test_a_clip_that_kills_its_worker_is_left_out(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "run", crashing)
    monkeypatch.setattr(prepare, "write_contact_sheet", lambda out, clips, path: path)
    (tmp_path / "raw" / "ann").mkdir(parents=True)
    for name in ("1.mp4", "2.mp4", "3.mp4"):
        (tmp_path / "raw" / "ann" / name).touch()
    summary = prepare.prepare(tmp_path / "raw", tmp_path / "data", TINY, workers=1, progress=False)
    assert summary.failed == [("ann/2.mp4", DIED)]
    assert (tmp_path / "data" / "failed.csv").read_text() == f'source,reason\nann/2.mp4,"{DIED}"\n'
    assert read_clips(tmp_path / "data") == [Clip(f"ann/ann_{k}", "ann", "train", 7, f"ann/{k}.mp4") for k in (1, 3)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DheadsError("/raw/a/b.mp4 holds no sound stream;\n give one"), "it holds no sound stream; give one"),
        (DheadsError("cannot read /raw/a/b.wav: gone"), "cannot read its sound: gone"),
        (MemoryError("of 9 TB"), "MemoryError: of 9 TB"),
        (TypeError("odd"), "TypeError: odd (unexpected; please report it)"),
        (KeyError("x"), "KeyError: 'x' (unexpected; please report it)"),
        (OSError(errno.EIO, "Input/output error", "/raw/a/b.mp4"), "OSError: [Errno 5] Input/output error: 'it'"),
        (PermissionError(errno.EACCES, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
        (RuntimeError("x" * 1000), "RuntimeError: " + "x" * 436 + " (unexpected; please report it)"),
        (cv2.error("assertion failed"), "assertion failed"),
        (av.error.InvalidDataError(1, "damaged"), "InvalidDataError: [Errno 1] damaged"),
        (RecursionError("deep"), "RecursionError: deep (unexpected; please report it)"),
    ],
)
def test_any_exception_for_a_damaged_file_is_its_reason(tmp_path: Path, error: Exception, reason: str) -> None:
    def extract(raw: Path, source: Source) -> Extract:
        raise error

    source = Source("a/b.mp4", "a/b", "a", "train", sound="a/b.wav")
    assert prepare_clip(extract, Path("/raw"), tmp_path, source) == reason
    assert not list(tmp_path.iterdir())


def test_a_failed_gpu_ends_the_process_and_not_the_clip(tmp_path: Path) -> None:
    def extract(raw: Path, source: Source) -> Extract:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        prepare_clip(extract, tmp_path, tmp_path, Source("a.mp4", "a/a", "a", "train"))


# --- Disks


def full(*given: object, **more: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_to_the_muxer(path: Path, *given: object) -> None:
    try:
        full()
    except OSError as error:
        raise DheadsError(f"cannot write {path}: {error.strerror}") from error


@pytest.mark.parametrize(("name", "writer"), [("write_clip", full_to_the_muxer), ("save", full)])
def test_a_full_disk_is_not_the_clips_fault(
    whole: Whole,
    tmp_path: Path,
    tried: list[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    writer: Callable[..., None],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(whole.data, data)
    for missing in ("clips.csv", "failed.csv", "clips/ann/ann_1.mp4", "clips/ann/ann_1.safetensors"):
        (data / missing).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(clip_worker, name, writer)
        with pytest.raises(DheadsError, match=r"cannot write to .*data: No space left on device; mend that and run"):
            prepare.prepare(whole.raw, data, TINY, progress=False)
    assert tried == ["ann/0.mp4", "ann/1.mp4"]
    assert "ann/1.mp4" not in (data / "failed.csv").read_text()
    assert [path.name for path in sorted((data / "clips" / "ann").iterdir())] == ["ann_2.mp4", "ann_2.safetensors"]
    prepare.prepare(whole.raw, data, TINY, progress=False)
    assert contents(data) == contents(whole.data)


def test_a_disk_that_is_full_from_the_beginning(
    whole: Whole, tmp_path: Path, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DheadsError, match=rf"cannot write {tmp_path}: No space left on device; choose another --out"):
        prepare.prepare(whole.raw, tmp_path, TINY, progress=False)
    assert tried == []


def test_frames_that_fail_only_when_they_are_written(whole: Whole, tmp_path: Path, detector: Detector) -> None:
    """The file is at fault, although the error comes late."""

    def extract(raw: Path, source: Source) -> Extract:
        made = detector(raw, source)
        return Extract(damaged(made.frames), made.waveform, made.labels)

    def damaged(frames: Iterator[tuple[np.ndarray, float]]) -> Iterator[tuple[np.ndarray, float]]:
        yield next(frames)
        raise ValueError("frame 1 is damaged")

    source = Source("ann/1.mp4", "ann/1", "ann", "train")
    assert prepare_clip(extract, whole.raw, tmp_path, source).startswith("ValueError: frame 1 is damaged (")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- The folder


def test_a_folder_that_was_prepared_with_other_options(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    shutil.copy(whole.data / "dataset.toml", tmp_path)
    stricter = override(TINY, {"preparation": {"max_gap": 2}})
    with pytest.raises(DheadsError, match=r"holds clips prepared with preparation = .*; choose another --out"):
        prepare.prepare(whole.raw, tmp_path, stricter, progress=False)
    (tmp_path / "dataset.toml").write_bytes(b"format = \xff\n")
    with pytest.raises(DheadsError, match=r"dataset\.toml: cannot be read .*; choose another --out"):
        prepare.prepare(whole.raw, tmp_path, TINY, progress=False)
    assert tried == []


def test_another_name_for_the_same_preparation(whole: Whole, tmp_path: Path, tried: list[str]) -> None:
    shutil.copytree(whole.data, tmp_path / "data")
    renamed = override(TINY, {"name": "mine", "training": {"steps": 7}})
    prepare.prepare(whole.raw, tmp_path / "data", renamed, progress=False)
    assert contents(tmp_path / "data") == contents(whole.data)


def test_reasons_of_one_kind_count_together() -> None:
    kinds = {
        "no face in 12 of 75 frames": "no face in N of N frames",
        "picture and sound differ in length by 0.28 s": "picture and sound differ in length by N s",
        "it holds no sound stream; give a file with speech in it": "it holds no sound stream",
        DIED: DIED,
    }
    assert {reason: prepare._kind(reason) for reason in kinds} == kinds
