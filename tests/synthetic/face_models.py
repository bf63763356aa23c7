"""Synthetic face models in the formats of insightface's packs, and pictures they see faces in.

Nothing here was trained and no real face is found. A "face" is a disc on grey ground whose upper
half is red and whose lower half is blue. The detector measures such discs: convolutions sum the
colours in a window and their first moments, which give centre, radius and tilt; from these follow
box and landmarks, by the fixed offsets below. Hence a test knows the truth from what it drew. The
recogniser is a random linear map of an 8 x 8 thumbnail.

Inputs, outputs, their order, anchors and strides are those of SCRFD-10GF with landmarks
(``det_10g.onnx``) and of ArcFace (``w600k_r50.onnx``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

STRIDES = (8, 16, 32)
LANDMARKS = ((-0.40, -0.25), (0.38, -0.28), (0.02, 0.10), (-0.30, 0.45), (0.28, 0.48))
"""(right, down) of the disc's own axes, in radii."""
BOX = 1.25
"""Half the side of the box, in radii."""
RADII = (0.6, 1.3)
"""Discs that a grid answers to, in strides: all grids together see radii of 4.8 to 41.6 pixels."""

BUFFALO_L = ("det_10g.onnx", "w600k_r50.onnx")


@dataclass(frozen=True)
class Disc:
    """A face to draw: centre and radius in pixels, tilt in degrees clockwise, colour strength."""

    x: float
    y: float
    radius: float
    tilt: float = 0.0
    strength: float = 1.0

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Its right and its down, as unit vectors in the picture."""
        angle = math.radians(self.tilt)
        right = np.array([math.cos(angle), math.sin(angle)])
        return right, np.array([-right[1], right[0]])

    def landmarks(self) -> Tensor:
        """Where its landmarks are, ``[5, 2]``."""
        right, down = self.axes()
        centre = np.array([self.x, self.y])
        points = [centre + self.radius * (a * right + b * down) for a, b in LANDMARKS]
        return torch.tensor(np.stack(points), dtype=torch.float32)

    def box(self) -> Tensor:
        """Left, top, right, bottom."""
        half = BOX * self.radius
        return torch.tensor([self.x - half, self.y - half, self.x + half, self.y + half])


def picture(height: int, width: int, discs: Sequence[Disc], seed: int = 0) -> Tensor:
    """Draw discs on grey noise: ``[1, height, width, 3]`` in 0..1, in steps of 1/255."""
    random = np.random.default_rng(seed)
    grey = random.uniform(0.3, 0.7, (-(-height // 16), -(-width // 16), 1))
    image = np.kron(grey, np.ones((16, 16, 3)))[:height, :width]
    y, x = np.mgrid[:height, :width].astype(float)
    for disc in discs:
        _, down = disc.axes()
        offset_x, offset_y = x - disc.x, y - disc.y
        cover = np.clip(disc.radius - np.hypot(offset_x, offset_y) + 0.5, 0, 1)[..., None]
        lower = np.clip(offset_x * down[0] + offset_y * down[1] + 0.5, 0, 1)[..., None]
        colour = lower * np.array([0, 0, 1.0]) + (1 - lower) * np.array([1.0, 0, 0])
        image = image * (1 - cover) + disc.strength * colour * cover
    return torch.from_numpy(np.round(image * 255) / 255).float()[None]


def build_pack(
    folder: Path,
    names: tuple[str, str] = BUFFALO_L,
    *,
    size: int | None = None,
    batched: bool = False,
    others: bool = True,
) -> Path:
    """Write a pack.

    Args:
        folder: Where to; it is made.
        names: Files of the detector and of the recogniser.
        size: Fix the detector's input to a square of this side.
        batched: Give the detector's outputs a leading dimension of one, as some exports have.
        others: Add the files of a real pack that are neither of the two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(detector(size, batched), str(folder / names[0]))
    onnx.save(recogniser(), str(folder / names[1]))
    if others:
        for name, side, numbers in (("1k3d68", 192, 3309), ("2d106det", 192, 212)):
            onnx.save(_thumbnail(side, numbers, 0), str(folder / f"{name}.onnx"))
        onnx.save(_thumbnail(96, 3, 0), str(folder / "genderage.onnx"))
    return folder


def recogniser() -> onnx.ModelProto:
    """An ArcFace-shaped model: ``[*, 3, 112, 112]`` -> ``[*, 512]``."""
    return _thumbnail(112, 512, seed=1)


class _Graph:
    """Collects nodes and weights under running names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, kind: str, *inputs: str | float | np.ndarray, **attributes: object) -> str:
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], **attributes))
        return out

    def constant(self, value: float | np.ndarray) -> str:
        array = value if isinstance(value, np.ndarray) else np.array(value, np.float32)
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def model(
        self, inputs: Sequence[object], outputs: dict[str, Sequence[object]]
    ) -> onnx.ModelProto:
        for name in outputs:
            self.nodes.append(helper.make_node("Identity", [name], [f"out_{name}"]))
        graph = helper.make_graph(
            self.nodes,
            "synthetic",
            [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, inputs)],
            [
                helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, shape)
                for name, shape in outputs.items()
            ],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def _thumbnail(side: int, numbers: int, seed: int) -> onnx.ModelProto:
    graph = _Graph()
    cells = 8
    pooled = graph(
        "AveragePool", "input.1", kernel_shape=[side // cells] * 2, strides=[side // cells] * 2
    )
    flat = graph("Flatten", pooled)
    weights = np.random.default_rng(seed).normal(size=(3 * cells**2, numbers)).astype(np.float32)
    return graph.model(["None", 3, side, side], {graph("MatMul", flat, weights): [1, numbers]})


def detector(size: int | None = None, batched: bool = False) -> onnx.ModelProto:
    """An SCRFD-shaped model: ``[1, 3, H, W]`` -> scores, boxes, landmarks of three grids."""
    graph = _Graph()
    # From (x - 127.5) / 128 back to colour strength: red over green, blue over green.
    halves = np.zeros((2, 3, 1, 1), np.float32)
    halves[0, :2, 0, 0] = 128 / 255, -128 / 255
    halves[1, 1:, 0, 0] = -128 / 255, 128 / 255
    colours = graph("Relu", graph("Conv", "input.1", halves))
    rows = [_grid(graph, colours, stride, batched) for stride in STRIDES]
    lead = [1] if batched else []
    outputs = {
        name: [*lead, f"anchors{stride}", width]
        for k, width in enumerate((1, 4, 10))
        for stride, name in zip(STRIDES, (row[k] for row in rows), strict=True)
    }
    return graph.model([1, 3, size or "?", size or "?"], outputs)


def _grid(graph: _Graph, colours: str, stride: int, batched: bool) -> tuple[str, str, str]:
    """Scores, box distances and landmark offsets at one stride, in units of it."""
    side = 4 * stride
    steps = (np.arange(side, dtype=np.float32) - 2 * stride) / stride
    x, y = np.meshgrid(steps, steps)
    rim = np.ones_like(x)
    rim[1:-1, 1:-1] = 0
    area = np.full_like(x, 1 / stride**2)
    kernel = np.zeros((8, 2, side, side), np.float32)
    for half in range(2):
        kernel[3 * half : 3 * half + 3, half] = area, x * area, y * area
    kernel[6] = rim
    sums = graph(
        "Conv", colours, kernel, strides=[stride] * 2, pads=[2 * stride, 2 * stride, stride, stride]
    )
    split = graph.constant(np.ones(8, np.int64))
    names = [f"s{stride}_{i}" for i in range(8)]
    graph.nodes.append(helper.make_node("Split", [sums, split], names, axis=1))
    up, up_x, up_y, low, low_x, low_y, edge, _ = names
    strength = graph(
        "MaxPool",
        graph("ReduceMax", colours, axes=[1]),
        kernel_shape=[2 * stride] * 2,
        strides=[stride] * 2,
        pads=[stride, stride, 0, 0],
    )

    def centroid(moment: str, mass: str) -> str:
        return graph("Div", moment, graph("Add", mass, 1e-6))

    mass = graph("Add", up, low)
    centre = [centroid(graph("Add", a, b), mass) for a, b in ((up_x, low_x), (up_y, low_y))]
    down = [
        graph("Sub", centroid(low_x, low), centroid(up_x, up)),
        graph("Sub", centroid(low_y, low), centroid(up_y, up)),
    ]
    squares = [graph("Mul", one, one) for one in down]
    length = graph("Sqrt", graph("Add", graph("Add", *squares), 1e-9))
    down = [graph("Div", one, length) for one in down]
    filled = graph("Div", mass, graph("Mul", graph("Add", strength, 1e-6), math.pi))
    radius = graph("Sqrt", filled)

    conditions = [
        graph("Less", edge, 0.05),
        graph("Greater", radius, RADII[0]),
        graph("Less", radius, RADII[1]),
        *(graph("Less", graph("Abs", one), 0.55) for one in centre),
    ]
    score = strength
    for condition in conditions:
        score = graph("Mul", score, graph("Cast", condition, to=TensorProto.FLOAT))

    reach = graph("Mul", radius, BOX)
    box = [graph("Sub", reach, one) for one in centre]
    box += [graph("Add", reach, one) for one in centre]
    right = [down[1], graph("Neg", down[0])]
    points = []
    for a, b in LANDMARKS:
        for axis in range(2):
            along = graph("Add", graph("Mul", right[axis], a), graph("Mul", down[axis], b))
            points.append(graph("Add", centre[axis], graph("Mul", radius, along)))
    both = [  # the second anchor says the same, less surely
        graph("Concat", score, graph("Mul", score, 0.75), axis=1),
        graph("Concat", *box, *box, axis=1),
        graph("Concat", *points, *points, axis=1),
    ]
    scores, boxes, landmarks = (
        _flatten(graph, one, width, batched) for one, width in zip(both, (1, 4, 10), strict=True)
    )
    return scores, boxes, landmarks


def _flatten(graph: _Graph, grid: str, width: int, batched: bool) -> str:
    """``[1, 2 * width, h, w]`` -> ``[h * w * 2, width]``, the two anchors of a place together."""
    last = graph("Transpose", grid, perm=[0, 2, 3, 1])
    shape = [1, -1, width] if batched else [-1, width]
    return graph("Reshape", last, np.array(shape, np.int64))
