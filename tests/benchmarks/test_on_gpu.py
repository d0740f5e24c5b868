"""benchmarks/on_gpu.py without a GPU: every step does its work, and what is cut off or fails keeps what it had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return program("benchmarks/on_gpu.py")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_dry_run_proves_and_measures_everything(tmp_path: Path) -> None:
    done = run("benchmarks/on_gpu.py", tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    steps = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(steps) == {"card", "correctness", "sampling", "compiled", "training", "long", "prepare"}
    assert {name: step["exit_code"] for name, step in steps.items()} == dict.fromkeys(steps, 0), done.stdout
    rows = {name: step["rows"] for name, step in steps.items()}
    assert {row["outcome"] for row in rows["correctness"]} == {"passed"}, done.stdout
    assert len(rows["correctness"]) == 13
    assert rows["card"][1]["peak_flops_per_second"] > 1e8
    rows["sampling"] += rows["compiled"]
    ways = [(row["network"], row["way"], row.get("videos")) for row in rows["sampling"]]
    assert {("small", "eager", 3), ("crema", "eager", 1), ("crema", "plain", 1)} < set(ways)
    assert all(row["frames_per_second"] > 0 for row in rows["sampling"] if "frames_per_second" in row)
    assert [row["preset"] for row in rows["training"]] == ["tiny", "tiny"]
    assert all(row["examples_per_second"] > 0 and 0 < row["waiting"] < 1 for row in rows["training"])
    assert rows["long"][0]["memory_mib_at_the_end"] > 100
    assert rows["prepare"][0]["clips_per_second"] > 0
    assert done.stdout.count("done after") == 7
    table = run("benchmarks/gpu_table.py", tmp_path).stdout
    assert f"Tests that are marked `gpu`: {len(rows['correctness'])} passed." in table
    fastest = max(row["frames_per_second"] for row in rows["sampling"] if "frames_per_second" in row)
    assert f"| {fastest:.4g} |" in table
    assert "clips of 3 s a second" in table


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


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("-c", "import torch, runpy, sys; torch.cuda.is_available = lambda: False; sys.argv[:] = sys.argv[1:]; "
               "sys.path.insert(0, 'benchmarks'); runpy.run_path(sys.argv[0], run_name='__main__')",
               "benchmarks/on_gpu.py", tmp_path / "out")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "there is no GPU here; --dry-run does the same on the CPU\n"
    assert not (tmp_path / "out").exists()
