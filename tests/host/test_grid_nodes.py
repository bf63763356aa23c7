"""Grids on the host: a cell is what Apply IP-Adapter makes, and every picture finds its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.client import Json
from scripts.server import PromptFailed, PromptRejected, Server
from tests.host.conftest import Applier, Sampler, draw
from tests.host.server_fixtures import GOOD, changed, decode, executed, node, running, saved

pytestmark = pytest.mark.host

PRESETS = "linear, style transfer"
WEIGHTS = (0.0, 0.5, 1.0)
TEXT = "0, 0.5, 1"


@pytest.fixture
def grid(host: Any, model: Any, apply: Applier) -> Any:
    """What Image Prompt Grid gives: the models, and the grid."""

    def run(weights: str = TEXT, presets: str = PRESETS, **more: Any) -> Any:
        given = {"start_at": 0.0, "end_at": 1.0, **more}
        execute = host.node("ImagePromptGrid").execute
        return execute(model, apply.adapter, apply.prompt(), weights, presets, **given).args

    return run


def influence(host: Any, **changes: Any) -> Any:
    given = {"weight": 1.0, "layers": "linear", "scaling": "V only", "start_at": 0.0, "end_at": 1.0}
    return host.node("ImagePromptInfluence").execute(**given | changes).args[0]


def single(host: Any, model: Any, apply: Applier, weight: float, chosen: Any, **more: Any) -> Any:
    """What Apply IP-Adapter gives."""
    given = {"start_at": 0.0, "end_at": 1.0, "influence": chosen, **more}
    execute = host.node("ImagePromptApply").execute
    return execute(model, apply.adapter, apply.prompt(), weight, **given).args[0]


def test_a_cell_is_what_apply_makes_with_that_weight_and_preset(
    host: Any, model: Any, apply: Applier, sample: Sampler, grid: Any
) -> None:
    models, found = grid()
    assert found.rows == ("linear", "style transfer")
    assert found.columns == ("weight 0", "weight 0.5", "weight 1")
    pictures = [sample(one) for one in models]
    expected = [
        sample(single(host, model, apply, weight, influence(host, layers=preset)))
        for preset in ("linear", "style transfer")
        for weight in WEIGHTS
    ]
    assert all(map(torch.equal, pictures, expected))
    different = {picture.numpy().tobytes() for picture in pictures}
    assert len(different) == 5  # of six cells the two of weight 0 are one picture


def test_weight_0_is_the_base_bit_for_bit_in_every_row(
    host: Any, model: Any, sample: Sampler, grid: Any
) -> None:
    # The precise presets push away on their own; at weight 0 nothing is left of that either.
    models, _ = grid("0", "linear, strong middle, style transfer precise, composition precise")
    base = sample(model)
    assert all(torch.equal(sample(one), base) for one in models)


def test_window_mask_and_influence_act_in_every_cell(
    host: Any, model: Any, apply: Applier, sample: Sampler, grid: Any
) -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    more = {"start_at": 0.0, "end_at": 0.6, "mask": mask}
    chosen = {"weight": 0.7, "keyframes": "0:1, 1:0.2", "style_boost": 0.3}
    models, _ = grid(
        "0.8", PRESETS, influence=influence(host, layers="composition", **chosen), **more
    )
    for one, preset in zip(models, ("linear", "style transfer"), strict=True):
        wanted = influence(host, layers=preset, **chosen)
        expected = sample(single(host, model, apply, 0.8, wanted, **more))
        assert torch.equal(sample(one), expected)
        assert not torch.equal(expected, sample(single(host, model, apply, 0.8, wanted)))


def test_the_models_share_their_weights_and_leave_the_first_alone(model: Any, grid: Any) -> None:
    before = dict(model.model_options["transformer_options"])
    models, _ = grid(", ".join(map(str, np.linspace(0, 1, 20))), PRESETS)
    assert len(models) == 40 and all(one.model is model.model for one in models)
    assert model.model_options["transformer_options"] == before


@pytest.mark.parametrize(
    ("weights", "presets", "said"),
    [
        ("0, much", "linear", "hold 'much'.*numbers from -1 to 3"),
        ("0, 5", "linear", "hold 5"),
        ("1", "linear, stil", "hold 'stil'.*style transfer precise"),
        ("1", "", "presets of the grid are empty"),
    ],
)
def test_what_means_nothing_is_refused(
    host: Any, grid: Any, weights: str, presets: str, said: str
) -> None:
    with pytest.raises(host.library("ip_adapter.errors").InfluenceError, match=said):
        grid(weights, presets)
    answer = host.node("ImagePromptGrid").validate_inputs(weights=weights, presets=presets)
    assert isinstance(answer, str)


def test_texts_from_other_nodes_are_not_judged_before_they_are_known(host: Any) -> None:
    judge = host.node("ImagePromptGrid").validate_inputs
    assert judge(weights=None, presets=None) is True
    assert judge(presets="linear") is True


def labelled(host: Any, images: list[Tensor], found: Any, **more: Any) -> Any:
    given = {name: [value] for name, value in more.items()}
    return host.node("ImagePromptGridPicture").execute(images, [found], **given)


def test_the_sheet_is_shown_and_given(host: Any, grid: Any) -> None:
    _, found = grid("0, 1", "linear")
    images = [draw(2, 300, 280, 3, seed=seed).sigmoid() for seed in range(2)]
    out = labelled(host, images, found)
    (sheets,) = out.args
    assert len(sheets) == 2
    shown = out.ui.as_dict()["images"]
    assert [one["type"] for one in shown] == ["temp", "temp"]
    (wide,) = labelled(host, images, found, batch="side by side", cell_size=0).args
    assert len(wide) == 1 and wide.shape[2] > sheets.shape[2] + 2 * 280
    (small,) = labelled(host, images, found, cell_size=100).args
    assert small.shape[1] < 160


def test_wrong_pictures_or_another_s_grid_are_refused(host: Any, grid: Any) -> None:
    errors = host.library("ip_adapter.errors")
    _, found = grid()
    image = torch.zeros(1, 64, 64, 3)
    with pytest.raises(errors.ImageError, match="2 x 3 has 6 cells, and 5 images"):
        labelled(host, [image] * 5, found)
    with pytest.raises(errors.ImageError, match=r"one batch of 6 pictures\)"):
        labelled(host, [image.repeat(6, 1, 1, 1)], found, batch="side by side")
    with pytest.raises(errors.IncompatibleModelError, match="output of Image Prompt Grid"):
        labelled(host, [image] * 6, {"rows": 2})


# A real host, which makes the lists.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Any) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), model_files) as started:
        yield started


def with_grid(batch: int = 1, **inputs: Any) -> Json:
    """A grid in the place of Apply; every cell is saved, and the sheet as well."""
    prompt = changed(GOOD, "EmptyLatentImage", batch_size=batch)
    applied = prompt[node(prompt, "ImagePromptApply")]
    applied["class_type"] = "ImagePromptGrid"
    del applied["inputs"]["weight"]
    applied["inputs"] |= {"weights": TEXT, "presets": PRESETS, **inputs}
    pictures = [node(prompt, "VAEDecode"), 0]
    grid = [node(prompt, "ImagePromptGrid"), 1]
    label = {"class_type": "ImagePromptGridPicture", "inputs": {"images": pictures, "grid": grid}}
    keep = {"images": ["label", 0], "filename_prefix": "sheet"}
    return {**prompt, "label": label, "keep": {"class_type": "SaveImage", "inputs": keep}}


def with_one(weight: float, layers: str, batch: int) -> Json:
    """Apply IP-Adapter with an influence."""
    prompt = changed(GOOD, "EmptyLatentImage", batch_size=batch)
    chosen = {"weight": 1.0, "layers": layers, "scaling": "V only", "start_at": 0.0, "end_at": 1.0}
    prompt["influence"] = {"class_type": "ImagePromptInfluence", "inputs": chosen}
    return changed(prompt, "ImagePromptApply", weight=weight, influence=["influence", 0])


def places(sheet: np.ndarray, cell: np.ndarray) -> list[tuple[int, int]]:
    """Where on a sheet a picture lies, each of its pixels as a square of four."""
    large = np.repeat(np.repeat(cell, 4, axis=0), 4, axis=1)
    height, width = large.shape[:2]
    starts = np.argwhere((sheet == large[0, 0]).all(axis=-1))
    return [
        (y, x)
        for y, x in starts.tolist()
        if np.array_equal(sheet[y : y + height, x : x + width], large)
    ]


def test_a_grid_over_the_api_is_the_pictures_of_single_runs(server: Server) -> None:
    prompt = with_grid(batch=2)
    result = server.run(prompt, timeout=300)
    of_node = {
        name: [decode(image) for image in result.images if image.node_id == name]
        for name in (node(GOOD, "SaveImage"), "keep", "label")
    }
    cells, sheets, shown = of_node.values()
    assert [one.shape for one in cells] == [(64, 64, 3)] * 12
    assert len(sheets) == len(shown) == 2 and all(map(np.array_equal, sheets, shown))
    alone = [
        saved(server.run(with_one(weight, layers, 2), timeout=300))
        for layers in ("linear", "style transfer")
        for weight in WEIGHTS
    ]
    for number, picture in enumerate(cells):
        assert np.array_equal(picture, alone[number // 2][number % 2])
    for number, sheet in enumerate(sheets):
        found = [places(sheet, pictures[number]) for pictures in alone]
        # The two of weight 0 are one picture in two places.
        assert [len(one) for one in found] == [2, 1, 1, 2, 1, 1]
        assert found[0] == found[3]
        rows = [found[0][0][0], found[1][0][0], found[2][0][0]], [found[0][1][0], found[4][0][0]]
        assert len(set(rows[0])) == len(set(rows[1])) == 1 and rows[0][0] < rows[1][0]
        columns = [found[0][0][1], found[1][0][1], found[2][0][1]]
        assert columns == sorted(columns) == [found[3][1][1], found[4][0][1], found[5][0][1]]


def test_the_same_grid_again_comes_from_the_cache(server: Server) -> None:
    prompt = with_grid()
    server.run(prompt, timeout=300)
    again = copy.deepcopy(prompt)
    again["label"]["inputs"]["cell_size"] = 128
    ran = executed(server.run(again, timeout=300))
    assert ran == {"label", "keep"}


def test_texts_are_refused_before_anything_runs(server: Server) -> None:
    with pytest.raises(PromptRejected, match="hold 'x'; needed are numbers"):
        server.run(with_grid(weights="0, x"))
    with pytest.raises(PromptRejected, match="hold 'stile'; needed are names"):
        server.run(with_grid(presets="stile"))


def test_pictures_that_are_missing_are_said_to_be(server: Server) -> None:
    prompt = with_grid()
    prompt["one"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64}}
    prompt["one"]["inputs"] |= {"batch_size": 1, "color": 0}
    prompt["label"]["inputs"]["images"] = ["one", 0]
    with pytest.raises(PromptFailed, match="6 cells, and 1 images came in") as caught:
        server.run(prompt, timeout=300)
    assert caught.value.node_type == "ImagePromptGridPicture"
