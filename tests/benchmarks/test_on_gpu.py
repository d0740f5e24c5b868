"""benchmarks/on_gpu.py without a GPU: every step does its work, and what is cut off or fails keeps what it had."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, program
from real_data import dheads, in_this_process

from dheads.config import preset
from dheads.dataset.extraction import Detector

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return program("benchmarks/on_gpu.py")


@pytest.fixture
def small(on_gpu: ModuleType, untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices and a small dataset, and this process instead of those that a step starts."""

    def run(command: list[str], **options: object) -> None:
        if command[1:3] == ["-m", "dheads"]:
            assert dheads(*command[3:]).exit_code == 0
        else:
            assert command[1] == on_gpu.__file__
            on_gpu.main(Path(command[2]), "--dry-run" in command, None, command[command.index("--step") + 1])

    sizes = {"SMALL_PEAK_SIDE": 64, "CLIPS": 2, "CLIP_FRAMES": 6}
    for name, size in sizes.items():
        monkeypatch.setitem(on_gpu.random_dataset.__globals__, name, size)
    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    in_this_process(monkeypatch, Detector(preset("small"), "cpu"))


HERE = ("sampling", "compiled", "training", "long", "prepare")  # steps that this process can take


def test_every_step_measures(
    on_gpu: ModuleType, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = on_gpu.Place(torch.device("cpu"), True)
    assert on_gpu.SECONDS.keys() == {"card", "correctness", *HERE}
    rows = {name: list(on_gpu.STEPS[name](place)) for name in HERE}
    for name, some in rows.items():
        on_gpu.write(tmp_path / f"{name}.json", some, 1.0, 0)
    ways = [(row["network"], row["way"], row.get("videos")) for row in rows["sampling"] + rows["compiled"]]
    assert {("small", "eager", 3), ("crema", "eager", 1), ("crema", "plain", 1)} < set(ways)
    speeds = [row["frames_per_second"] for row in rows["sampling"] + rows["compiled"] if "frames_per_second" in row]
    assert min(speeds) > 0
    assert [row["preset"] for row in rows["training"]] == ["tiny", "tiny"]
    assert all(row["examples_per_second"] > 0 and 0 < row["waiting"] < 1 for row in rows["training"])
    assert rows["long"][0]["memory_mib_at_the_end"] > 100
    assert rows["prepare"][0]["clips_per_second"] > 0
    assert table(tmp_path, capsys).count(f"| {max(speeds):.4g} |") == 1
    assert "clips of 3 s a second" in table(tmp_path, capsys)


def table(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    program("benchmarks/gpu_table.py").main(folder)
    return capsys.readouterr().out


def test_a_dry_run_proves_by_processes_of_its_own(
    on_gpu: ModuleType,
    warm: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The tests marked `gpu`, on the CPU."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(warm)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    on_gpu.main(out, dry_run=True, only=["card", "correctness"], step=None)
    said = capfd.readouterr().out
    assert said.count("done after") == 2
    steps = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert {name: step["exit_code"] for name, step in steps.items()} == {"card": 0, "correctness": 0}, said
    tests = steps["correctness"]["rows"]
    assert {row["outcome"] for row in tests} == {"passed"}, said
    assert len(tests) == 11
    assert steps["card"]["rows"][1]["peak_flops_per_second"] > 1e8
    assert "Tests that are marked `gpu`: 11 passed." in table(out, capfd)


@pytest.fixture
def scripted(on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], dict]:
    """Runs a step that is this Python source, for at most so many seconds; what its file says afterwards."""

    def scripted(source: str, seconds: float) -> dict:
        step = tmp_path / "step.py"
        step.write_text(f"import json, os, time\ndef row(n): print(json.dumps({{'n': n}}), flush=True)\n{source}\n")
        monkeypatch.setattr(on_gpu, "__file__", str(step))
        monkeypatch.setattr(on_gpu, "SECONDS", {"some": seconds})
        on_gpu.run("some", tmp_path / "some.json", False)
        return json.loads((tmp_path / "some.json").read_text())

    return scripted


def test_a_step_that_takes_too_long_keeps_its_rows(
    scripted: Callable[[str, float], dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """It and what it started are ended."""
    found = scripted("row(1); row(2); os.system('sleep 60')", 1.5)
    assert found["rows"] == [{"n": 1}, {"n": 2}]
    assert found["exit_code"] == -9
    assert 1.5 <= found["seconds"] < 20
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[1] for line in printed[:2]] == ["n 1", "n 2"]
    assert printed[2].startswith("some         cut off after ")


def test_a_step_that_fails_keeps_its_rows(
    scripted: Callable[[str, float], dict], capsys: pytest.CaptureFixture[str]
) -> None:
    found = scripted("row(1); raise SystemExit(3)", 30)
    assert (found["rows"], found["exit_code"]) == ([{"n": 1}], 3)
    assert "some         failed after " in capsys.readouterr().out


def test_without_a_gpu_it_says_so(on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^there is no GPU here; --dry-run does the same on the CPU$"):
        on_gpu.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()
