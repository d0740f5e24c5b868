"""The face mesh in PyTorch: the packaged detector's numbers, with gradients."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import program

from dheads.config import Config, preset
from dheads.faces.alignment import mouth_opening
from dheads.faces.landmarks import load_backend
from dheads.faces.litert import FaceNet
from dheads.media.pixels import to_unit
from dheads.sampling.portrait import find_portrait
from dheads.sampling.staging import staged

SMALL: Config = preset("small")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return program("recipes/torch_mesh.py")


def test_the_network_computes_what_litert_computes(recipe: ModuleType) -> None:
    pictures = torch.rand((2, 3, 192, 192), generator=torch.Generator().manual_seed(0))
    litert = FaceNet("face_landmark.tflite")
    computed = recipe.TorchNet(litert.model)(pictures)
    for index, picture in enumerate(pictures):
        for name, values in litert(picture.permute(1, 2, 0).numpy()).items():
            np.testing.assert_allclose(computed[name][index].numpy(), values.ravel(), atol=1e-3)


def test_an_operator_that_is_not_known_is_named(recipe: ModuleType) -> None:
    with pytest.raises(NotImplementedError, match="TANH"):
        recipe._run("TANH", None, [torch.zeros(1)])


def test_a_face_is_read_where_its_pose_says(recipe: ModuleType, examples: Path) -> None:
    photo = staged(SMALL, find_portrait(examples / "face.jpg", SMALL, load_backend("mesh")), None).photo
    frame, still = to_unit(photo)[None], torch.zeros(1, 6)
    mesh = recipe.TorchMesh(SMALL.alignment)
    expected = mouth_opening(load_backend("mesh").track([photo]))[0]
    assert mesh.opening(frame, still).item() == pytest.approx(expected, abs=0.03)
    moved = torch.tensor([[0.0, 0.0, 0.25, 0.0, 0.0, 0.0]])  # by 16 of 128 px
    shifted = torch.roll(frame, 16, 3)
    assert mesh.opening(shifted, moved).item() == pytest.approx(mesh.opening(frame, still).item(), abs=0.01)


def test_gradients_say_how_to_open_a_mouth(recipe: ModuleType, examples: Path) -> None:
    photo = staged(SMALL, find_portrait(examples / "face.jpg", SMALL, load_backend("mesh")), None).photo
    mesh, still = recipe.TorchMesh(SMALL.alignment), torch.zeros(1, 6)
    frame = to_unit(photo)[None].requires_grad_()
    opening = mesh.opening(frame, still)
    (gradient,) = torch.autograd.grad(opening, frame)
    wider = mesh.opening((frame + 0.02 * gradient / gradient.abs().max()).detach(), still)
    assert wider.item() > opening.item() + 1e-4
