"""The packaged face networks as LiteRT runs them."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest

from dheads.faces.litert import FaceNet


def test_outputs_are_those_of_opencv_at_every_size() -> None:
    net = FaceNet("face_detection_short_range.tflite")
    for size in (128, 256, 128):
        image = np.random.default_rng(size).uniform(-1, 1, (size, size, 3)).astype(np.float32)
        outputs = net(image)
        reference = cv2.dnn.readNetFromTFLite(np.frombuffer(net.model, np.uint8))
        reference.setInput(cv2.dnn.blobFromImage(image))
        for name in ("classificators", "regressors"):
            np.testing.assert_allclose(outputs[name], reference.forward(name)[0], atol=2e-3)


@pytest.mark.parametrize("closed", ["", "os.close(2);"])
def test_nothing_is_printed(closed: str) -> None:
    code = f"""import os, sys; {closed}
import numpy as np
from dheads.faces.litert import FaceNet
outputs = FaceNet("iris_landmark.tflite")(np.zeros((64, 64, 3), np.float32))
print({{name: output.shape for name, output in sorted(outputs.items())}})
if not {bool(closed)}: print("errors are heard again", file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'output_eyes_contours_and_brows': (213,), 'output_iris': (15,)}\n"
    assert done.stderr == ("" if closed else "errors are heard again\n")
