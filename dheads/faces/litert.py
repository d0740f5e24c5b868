"""The packaged face networks, run by LiteRT, the library that their format is made for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import numpy as np
from ai_edge_litert.interpreter import Interpreter


class FaceNet:
    """A TensorFlow Lite network of assets/, by its file name. It uses one thread: it is too small to gain by more."""

    def __init__(self, name: str) -> None:
        self.model = resources.files("dheads").joinpath("assets", name).read_bytes()
        self._interpreters: dict[tuple[int, ...], Interpreter] = {}  # by the shape of the input

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs, by name and without the batch's dimension, of a picture (H, W, 3) float32."""
        interpreter = self._interpreters.get(image.shape)
        if interpreter is None:
            interpreter = self._interpreters[image.shape] = self._load(image.shape)
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        return {
            output["name"]: interpreter.get_tensor(output["index"])[0] for output in interpreter.get_output_details()
        }

    def _load(self, shape: tuple[int, ...]) -> Interpreter:
        with _without_stderr():
            interpreter = Interpreter(model_content=self.model, num_threads=1)
            interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], [1, *shape])
            interpreter.allocate_tensors()
        return interpreter


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what the process writes to stderr: LiteRT names its kernels there, and has no setting against it."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
