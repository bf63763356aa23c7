"""Counted work and memory, on work whose counts are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ip_adapter.bench import counting
from ip_adapter.bench.counting import Work

X, W = torch.ones(3, 5), torch.ones(7, 5)
Q, KV = torch.ones(2, 4, 16, 8), torch.ones(2, 4, 6, 8)
PIXELS, KERNEL = torch.ones(1, 3, 8, 8), torch.ones(5, 3, 3, 3)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: F.linear(X, W), Work(1, 0, 1, 0, 1, 2 * 3 * 5 * 7)),
        (lambda: X @ W.mT, Work(2, 0, 1, 0, 1, 2 * 3 * 5 * 7)),
        (lambda: torch.addmm(torch.zeros(7), X, W.mT).view(-1), None),
        (
            lambda: F.scaled_dot_product_attention(Q, KV, KV),
            Work(1, 1, 0, 0, 1, 2 * 2 * 4 * 16 * 6 * (8 + 8)),
        ),
        (lambda: F.conv2d(PIXELS, KERNEL, padding=1), Work(1, 0, 0, 0, 1, 2 * 5 * 64 * 27)),
        (lambda: float(X.sum()), Work(2, 0, 0, 1, 1, 0)),
        (lambda: X[0].view(1, 5), Work(2, 0, 0, 0, 0, 0)),
    ],
)
def test_work_in_inference_mode_is_what_python_calls(work: object, expected: Work | None) -> None:
    assert callable(work)
    with torch.inference_mode():
        found = counting.count(work)
    if expected is None:  # zeros, a view, the product, a view
        assert (found.products, found.flops) == (1, 2 * 3 * 5 * 7)
    else:
        assert found == expected


def test_the_arithmetic_is_the_same_outside_of_inference_mode() -> None:
    def work() -> Tensor:
        return F.scaled_dot_product_attention(Q, KV, KV).flatten(2) @ torch.ones(2, 128, 3)

    with torch.inference_mode():
        inside = counting.count(work)
    with torch.no_grad():
        outside = counting.count(work)
    assert inside.flops == outside.flops == 2 * 2 * 4 * 16 * 6 * 16 + 2 * 2 * 4 * 128 * 3
    assert (inside.attentions, outside.attentions) == (1, 1)


def test_differences_of_work() -> None:
    assert Work(5, 4, 3, 2, 1, 9) - Work(1, 1, 1, 1, 1, 1) == Work(4, 3, 2, 1, 0, 8)


def test_the_peak_is_what_lives_at_the_same_time() -> None:
    def work() -> Tensor:
        for _ in range(3):  # one at a time
            torch.empty(1000)
        first, second = torch.empty(500), torch.empty(500)
        view = first[:10]
        del first, second
        third = torch.empty(800)  # with the view's storage
        return view.sum() + third.sum()

    with torch.no_grad():
        found = counting.peak_bytes(work, "cpu")
    assert found == 4 * (500 + 800) + 3 * 4  # two sums and their sum


def test_the_peak_sees_gradients() -> None:
    weights = torch.ones(100, 100, requires_grad=True)

    def work() -> None:
        (torch.ones(100, 100) @ weights).sum().backward()  # type: ignore[no-untyped-call]

    found = counting.peak_bytes(work, "cpu")
    # the ones that are kept, and the product or its gradient; the sum and its gradient
    assert found == 2 * 40_000 + 2 * 4


def test_tensors_are_counted_once_for_each_storage() -> None:
    before = counting.tensor_bytes()
    kept = torch.zeros(10_000)
    views = [kept[:10], kept.view(100, 100)]
    assert counting.tensor_bytes() - before == 40_000
    del kept, views
    assert counting.tensor_bytes() == before


def test_resident_memory_is_seen() -> None:
    before = counting.resident()
    with counting.peak_resident() as seen:
        block = torch.ones(8_000_000)
        assert counting.resident() - before > 24_000_000
        del block
    assert len(seen) == 1 and seen[0] > 24_000_000
