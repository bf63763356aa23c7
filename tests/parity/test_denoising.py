"""One denoising prediction with an image prompt at SD 1.5's real width: host against diffusers.

Both sides hold the same random weights in the real channel plan (860 M parameters) and read the
same adapter. `test_families` and `test_influence` vary adapters and their influence on narrow UNets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity import reference, unets
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close, relative_error

pytestmark = [pytest.mark.parity, pytest.mark.host]

FEATURES = {"sd15": (1024,), "plus_sd15": (257, 1280)}


@pytest.fixture(scope="module")
def pair() -> unets.Pair:
    return unets.pair("SD 1.5", narrow=False)


@pytest.fixture(scope="module", params=FEATURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapter(name: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("adapter")
    return unets.load(adapters.write(catalogue.ROWS[name], folder, seed=3))


def features(name: str) -> Tensor:
    drawn = unets.draw(2, *FEATURES[name], seed=3)
    if name == "sd15":
        drawn[0] = 0  # the paper's dropped image condition
    return drawn


@pytest.mark.parametrize(
    ("weight", "size"),
    [(0.0, (16, 16)), (1.0, (16, 16)), (0.5, (24, 16))],
    ids=["weight 0", "weight 1", "half, portrait"],
)
def test_one_prediction_agrees_with_diffusers(
    pair: unets.Pair, name: str, adapter: Any, weight: float, size: tuple[int, int]
) -> None:
    given, read = unets.inputs("SD 1.5", size), features(name)
    tensors = adapters.make(catalogue.ROWS[name], seed=3)
    loaded = reference.load(pair.reference, [tensors], [weight], in_place=True)
    rows = reference.predict(loaded, given, [read[:, None]])
    patched = unets.apply(pair.model, adapter, unets.tokens(adapter, image=read), weight=weight)
    for cfg in (1.0, 7.5):
        expected, found = unets.guided(rows, cfg), unets.predict(patched, given, cfg)
        print(f"{name} weight {weight} {size} cfg {cfg}: {relative_error(found, expected):.1e}")
        assert_close(found, expected, relative=1e-4)
    # Two sides that both ignored the adapter would agree.
    if weight != 0:
        assert relative_error(found, unets.predict(pair.model, given)) > 1e-2
    else:
        assert torch.equal(found, unets.predict(pair.model, given))
