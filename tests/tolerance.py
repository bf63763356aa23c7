"""The one place that says how close two numbers must be."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Allowed error relative to the largest value of the reference, by dtype."""


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Largest deviation, relative to the largest value of the reference."""
    found, reference = found.detach(), reference.detach()
    scale = reference.abs().max().clamp_min(1e-12)
    return float((found.double() - reference.double()).abs().max() / scale)


def assert_close(found: Tensor, reference: Tensor, relative: float | None = None) -> None:
    """Fail with both figures unless shapes are equal and the error is within the tolerance."""
    assert found.shape == reference.shape, f"{tuple(found.shape)} != {tuple(reference.shape)}"
    allowed = RELATIVE[found.dtype] if relative is None else relative
    error = relative_error(found, reference)
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
