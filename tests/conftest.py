"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import pytest
import torch

from dheads.sampling import calibration
from dheads.sampling.talker import Talker, load

ROOT = Path(__file__).resolve().parents[1]

# The networks of the tests are so small that more threads would only wait for each other.
torch.set_num_threads(1)
cv2.setNumThreads(1)
# In a shell's background Ctrl-C is ignored, and its programs inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the slow ones first


def program(path: str) -> ModuleType:
    """A program of benchmarks/ or recipes/ as a module."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips, photos and reference numbers beside the project; skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("the folder of reference data is not beside the project")
    return folder


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with face.jpg, the astronaut that ships with the project (512 px), and speech.wav, 3.68 s by espeak-ng:
    "Hello. I was only a photo, and now I can speak." (voice en-us+f3, CC0)."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copy(ROOT / "examples" / "astronaut.jpg", folder / "face.jpg")
    shutil.copy(ROOT / "tests" / "media" / "robot.wav", folder / "speech.wav")
    return folder


@pytest.fixture(scope="session")
def packaged() -> Talker:
    """The packaged weights with their networks, loaded once."""
    return load(device="cpu", progress=False)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a face opens its mouth is not found out, which takes longer than a few frames."""
    monkeypatch.setattr(calibration, "lip_gain", lambda engine, identity, slots: 1.0)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The beginning of a command line, in place of `python`: a process of its own that has PyTorch loaded at once."""
    command = [sys.executable, str(ROOT / "tests" / "cli" / "warm.py"), str(tmp_path_factory.mktemp("warm") / "socket")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield command
        server.kill()


@pytest.fixture(autouse=True)
def _silent_log() -> None:
    """The command line sets up the log of its process, which all tests share."""
    log = logging.getLogger("dheads")
    log.handlers = []
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
