"""MediaPipe's face mesh as a PyTorch module: on a GPU it reads hundreds of faces at once, and it has gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ai_edge_litert import schema_py_generated as tflite
from torch import Tensor, nn

from dheads.config import AlignmentConfig
from dheads.extensions.pose import done
from dheads.extensions.warp import sampled
from dheads.faces.alignment import EYES
from dheads.faces.litert import FaceNet
from dheads.faces.mesh import MESH_TO_68, MeshBackend

# The mesh's view of the mean face, in eye distances: its centre below the eyes, and its half side.
_BELOW_EYES, _HALF_SIDE = 0.42, 1.9
_NAMES = {code: name for name, code in vars(tflite.BuiltinOperator).items() if isinstance(code, int)}


class TorchNet(nn.Module):
    """A TensorFlow Lite network of float32 numbers and of few operators; its weights are buffers."""

    def __init__(self, model: bytes) -> None:
        super().__init__()
        parsed = tflite.ModelT.InitFromPackedBuf(model, 0)
        graph = parsed.subgraphs[0]
        self._inputs, self._outputs = list(graph.inputs), list(graph.outputs)
        self._names = {index: graph.tensors[index].name.decode() for index in self._outputs}
        codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in parsed.operatorCodes]
        self._operators = [(_NAMES[codes[operator.opcodeIndex]], operator) for operator in graph.operators]
        for index, tensor in enumerate(graph.tensors):
            data = parsed.buffers[tensor.buffer].data
            if data is not None:
                kind = np.float32 if tensor.type == tflite.TensorType.FLOAT32 else np.int32
                values = np.frombuffer(data.tobytes(), kind).reshape(tensor.shape)
                self.register_buffer(f"tensor_{index}", torch.from_numpy(values.copy()), persistent=False)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """The outputs (B, ...), by name, of pictures (B, 3, H, W)."""
        values = {self._inputs[0]: pictures}
        for name, operator in self._operators:
            given = [values[k] if k in values else self.get_buffer(f"tensor_{k}") for k in operator.inputs]
            values[operator.outputs[0]] = _run(name, operator.builtinOptions, given)
        return {name: values[index].permute(0, 2, 3, 1).flatten(1) for index, name in self._names.items()}


def _run(name: str, options: Any, given: Sequence[Tensor]) -> Tensor:
    """One operator; its constants lie as TensorFlow has them, channels last, and its pictures as PyTorch has them."""
    x = given[0]
    match name:
        case "CONV_2D" | "DEPTHWISE_CONV_2D":
            weight, stride = given[1].permute(0, 3, 1, 2), options.strideH  # (O, I, h, w)
            groups = x.shape[1] if name.startswith("DEPTHWISE") else 1
            if groups > 1:
                weight = weight.transpose(0, 1)
            if options.padding == tflite.Padding.SAME:
                x = F.pad(x, _same(x.shape[3], weight.shape[3], stride) + _same(x.shape[2], weight.shape[2], stride))
            return F.conv2d(x, weight, given[2], stride, groups=groups)
        case "PRELU":
            return torch.where(x < 0, x * given[1].flatten()[:, None, None], x)
        case "ADD":
            return x + given[1]
        case "MAX_POOL_2D":
            return F.max_pool2d(x, (options.filterHeight, options.filterWidth), options.strideH)
        case "PAD":  # of channels
            return F.pad(x, (0, 0, 0, 0, *given[1][3].tolist()))
    raise NotImplementedError(name)


def _same(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's padding SAME along one axis: where it is odd, the end has one more than the beginning."""
    total = max(0, (-(-length // stride) - 1) * stride + kernel - length)
    return total // 2, total - total // 2


class TorchMesh(nn.Module):
    """The landmarks of faces that lie where their pose says, without a search for them."""

    def __init__(self, alignment: AlignmentConfig) -> None:
        super().__init__()
        self._net, size = TorchNet(FaceNet("face_landmark.tflite").model), MeshBackend.MESH_PX
        d = 2 * alignment.eye_distance  # of the crop's half side
        across = (2 * torch.arange(size) + 1) / size - 1
        rows, columns = torch.meshgrid(across, across, indexing="ij")
        grid = _HALF_SIDE * d * torch.stack([columns, rows], -1)  # (192, 192, 2)
        grid[..., 1] += 2 * alignment.eye_y - 1 + _BELOW_EYES * d
        self.register_buffer("_grid", grid, persistent=False)

    def forward(self, frames: Tensor, pose: Tensor) -> Tensor:
        """Landmarks (B, 68, 2) of frames (B, 3, H, W) with heads moved by poses (B, 6), in px of the mesh's view."""
        grid = done(pose[:, None, None], self.get_buffer("_grid")[None])
        outputs = self._net((sampled(frames, grid, "bilinear") + 1) / 2)
        vertices = outputs["conv2d_20"].unflatten(1, (468, 3))
        return vertices[:, torch.from_numpy(MESH_TO_68).to(vertices.device), :2]

    def opening(self, frames: Tensor, pose: Tensor) -> Tensor:
        """The opening of the mouths (B,), as faces/alignment.py has it; see `forward`."""
        points = self(frames, pose)
        left, right = (points[:, eye].mean(1) for eye in EYES)
        axis = right - left
        down = torch.stack([-axis[:, 1], axis[:, 0]], 1) / axis.square().sum(1, keepdim=True)
        inner = (points[:, [67, 66, 65]] - points[:, [61, 62, 63]]).mean(1)
        return (inner * down).sum(1)
