"""One denoising prediction with an image prompt at SD 1.5's real width: host against diffusers.

Both sides hold the same random weights in the real channel plan (860 M parameters) and read the
same adapter. `test_families` and `test_influence` vary adapters and influence on narrow UNets.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.parity import reference, unets
from tests.synthetic import adapters, catalogue
from tests.tolerance import assert_close, relative_error

pytestmark = [pytest.mark.parity, pytest.mark.host]

FEATURES = {"sd15": (1024,), "plus_sd15": (257, 1280)}


@pytest.fixture(scope="module")
def pair() -> unets.Pair:
    return unets.wide_pair("SD 1.5")


def features(name: str) -> Tensor:
    drawn = unets.draw(2, *FEATURES[name], seed=3)
    if name == "sd15":
        drawn[0] = 0  # the paper's dropped image condition
    return drawn


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("size", [(16, 16), (24, 16)], ids=["square", "portrait"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_one_prediction_agrees_with_diffusers(
    pair: unets.Pair, name: str, weight: float, size: tuple[int, int], tmp_path: Path
) -> None:
    adapter = unets.load(adapters.write(catalogue.ROWS[name], tmp_path, seed=3))
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
    effect = relative_error(found, unets.predict(pair.model, given))
    assert effect > 1e-2 if weight else effect == 0
