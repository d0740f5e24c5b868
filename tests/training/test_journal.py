"""The log files of a run: their rows, resuming, and full disks."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dheads.errors import DheadsError
from dheads.training.journal import Journal


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


class Writer:
    """A fake of TensorBoard's SummaryWriter."""

    made: list[Writer]
    full = False

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        self.log_dir, self.purge_step, self.closed = log_dir, purge_step, False
        self.points: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if Writer.full:
            raise OSError(28, "No space left on device")
        self.points.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [], raising=False)
    monkeypatch.setattr(Writer, "full", False)
    return Writer.made


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps(run: Path) -> list[int]:
    return [row["step"] for row in rows(run / "metrics.jsonl")]


def test_metrics_are_rows_of_six_digits(tmp_path: Path) -> None:
    with closing(Journal(tmp_path, 0)) as journal:
        journal.log(100, {"loss": 0.123456789, "lr": 5e-05, "examples": 20_000_001})
        journal.log(200, {"loss": float("nan"), "grad_norm": float("inf")})
        assert len(rows(tmp_path / "metrics.jsonl")) == 2  # there while the run goes on
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 100, "loss": 0.123457, "lr": 5e-05, "examples": 20_000_001},
        {"step": 200, "loss": None, "grad_norm": None},
    ]
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 100, ')
    assert not (tmp_path / "tensorboard").exists()


def test_events_are_rows_and_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Journal(tmp_path, 0)) as journal:
        journal.event(7, "bad step", "100 % of it: é", clips=["a/1", "b/2"], norm=float("nan"), path=Path("x"))
    assert rows(tmp_path / "events.jsonl") == [
        {"step": 7, "kind": "bad step", "message": "100 % of it: é", "clips": ["a/1", "b/2"], "norm": None, "path": "x"}
    ]
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        ("dheads", logging.WARNING, "100 % of it: é")
    ]


def write(run: Path, until: int) -> None:
    with closing(Journal(run, 0)) as journal:
        for step in range(100, until + 1, 100):
            journal.log(step, {"loss": 1.0})
            journal.event(step, "x", "y")


def test_resuming_drops_what_came_after(tmp_path: Path) -> None:
    write(tmp_path, 500)
    with closing(Journal(tmp_path, 300)) as journal:
        assert steps(tmp_path) == [100, 200, 300]
        assert [row["step"] for row in rows(tmp_path / "events.jsonl")] == [100, 200, 300]
        journal.log(400, {"loss": 2.0})
    assert steps(tmp_path) == [100, 200, 300, 400]


def test_resuming_beyond_the_end_keeps_every_byte(tmp_path: Path) -> None:
    write(tmp_path, 300)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Journal(tmp_path, 1000).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 300)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-9])
    with closing(Journal(tmp_path, 300)) as journal:
        journal.log(400, {"loss": 2.0})
    assert steps(tmp_path) == [100, 200, 400]


def test_a_note_between_the_rows_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 200)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("my note\n" + metrics.read_text())
    Journal(tmp_path, 100).close()
    assert metrics.read_text() == 'my note\n{"step": 100, "loss": 1.0}\n'


def test_step_0_starts_empty_files(tmp_path: Path) -> None:
    write(tmp_path, 300)
    Journal(tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert (tmp_path / "events.jsonl").read_bytes() == b""


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DheadsError, match=r"metrics\.jsonl.*--out"):
        Journal(tmp_path, 0)


def test_rows_wait_for_a_disk_that_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with closing(Journal(tmp_path, 0)) as journal:
        journal.log(100, {"loss": 1.0})
        metrics.rename(tmp_path / "aside")
        metrics.mkdir()  # no room for a file
        journal.log(200, {"loss": 1.0})
        journal.log(300, {"loss": 1.0})
        assert len(caplog.records) == 1
        assert "metrics.jsonl" in caplog.text
        metrics.rmdir()
        (tmp_path / "aside").rename(metrics)
        journal.log(400, {"loss": 1.0})
        assert steps(tmp_path) == [100, 200, 300, 400]
        metrics.rename(tmp_path / "aside")
        metrics.mkdir()
        journal.log(500, {"loss": 1.0})
        assert len(caplog.records) == 2  # full again, and one more warning
    assert "lost its last 1 rows" in caplog.records[-1].getMessage()


def test_a_partly_written_row_is_completed(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Journal(tmp_path, 0)) as journal:
        journal.log(100, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            journal.log(200, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size + 10
        journal.log(300, {"loss": 1.0})
    assert steps(tmp_path) == [100, 200, 300]


def test_tensorboard_gets_curves_in_groups(tmp_path: Path, writers: list[Writer]) -> None:
    with closing(Journal(tmp_path, 0)) as journal:
        journal.log(
            100,
            {"loss": 1.0, "simple": 0.9, "simple_q1": 0.8, "q4": 0.7, "val_simple": 0.6, "val_simple_q1": 0.5}
            | {"grad_norm": 2.0, "lr": 5e-5, "examples_per_second": 9.0, "waiting": 0.01, "broken": 1.0},
        )
    (writer,) = writers
    assert Path(writer.log_dir) == tmp_path / "tensorboard"
    assert writer.closed
    assert {step for _, _, step in writer.points} == {100}
    assert {tag: value for tag, value, _ in writer.points} == {
        "loss/loss": 1.0,
        "loss/simple": 0.9,
        "loss_by_timestep/simple_q1": 0.8,
        "loss_by_timestep/q4": 0.7,
        "validation/simple": 0.6,
        "validation/simple_q1": 0.5,
        "optimiser/grad_norm": 2.0,
        "optimiser/lr": 5e-5,
        "speed/examples_per_second": 9.0,
        "speed/waiting": 0.01,
        "run/broken": 1.0,
    }


def test_tensorboard_hides_points_of_a_killed_run(tmp_path: Path, writers: list[Writer]) -> None:
    with closing(Journal(tmp_path, 300)) as journal:
        journal.log(400, {"loss": 1.0})
    assert [writer.purge_step for writer in writers] == [301]


def test_tensorboard_begins_again_after_a_full_disk(
    tmp_path: Path, writers: list[Writer], caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Journal(tmp_path, 0)) as journal:
        journal.log(100, {"loss": 1.0})
        Writer.full = True
        journal.log(200, {"loss": 1.0})
        journal.log(300, {"loss": 1.0})
        Writer.full = False
        journal.log(400, {"loss": 1.0})
    assert len(caplog.records) == 1
    assert [point[2] for writer in writers for point in writer.points] == [100, 400]
    assert writers[-1].purge_step == 101
    assert steps(tmp_path) == [100, 200, 300, 400]  # metrics.jsonl has all
