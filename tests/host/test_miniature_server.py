"""The miniature in a started ComfyUI: standard loaders list it, and image prompts do what they say.

Pictures are read by `miniature.reader`, a formula without any net. The references' combinations of
shape, colour and texture were in no training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniature import family, reader, world
from scripts import claims, demo
from scripts import miniature_graphs as graphs
from scripts.server import PACK_NAME, Server

pytestmark = pytest.mark.host

LISTED = {
    ("CheckpointLoaderSimple", "ckpt_name"): family.BASE,
    ("UNETLoader", "unet_name"): family.FINE_TUNE,
    ("ControlNetLoader", "control_net_name"): family.CONTROLNET,
    ("CLIPVisionLoader", "clip_name"): family.CLIP_VISION,
    ("ImagePromptLoadAdapter", "adapter_name"): family.ADAPTERS / graphs.GLOBAL,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("miniature")
    claims.write_inputs(base / "input")
    with Server(base, packs=[demo.PACK]) as started:
        yield started


def make(server: Server, prompt: Any) -> list[Image.Image]:
    made = demo.pictures(server.run(prompt, timeout=300))
    assert len(made) == claims.ROWS and {each.size for each in made} == {(64, 64)}
    return made


def agreeing(made: list[Image.Image], expected: list[world.Scene], *names: str) -> int:
    """In how many of the pictures all of these attributes are as expected."""
    rows = zip(demo.readings(made), expected, strict=True)
    return sum(all(reader.agreement(*row)[name] for name in names) for row in rows)


@pytest.mark.parametrize(("node", "field"), LISTED)
def test_a_standard_loader_lists_it(server: Server, node: str, field: str) -> None:
    path = LISTED[node, field]
    kind = path.relative_to(family.MODELS).parts[0]
    options = server.object_info(node)["input"]["required"][field]
    # Older hosts give the list itself as the type.
    listed = options[0] if isinstance(options[0], list) else options[1]["options"]
    assert str(path.relative_to(family.MODELS / kind)) in listed


def test_both_packs_load_without_a_complaint(server: Server) -> None:
    lines = [line for line in server.log_text().splitlines() if "custom_nodes" in line]
    for name in (PACK_NAME, demo.PACK.name):
        (line,) = (line for line in lines if line.replace("\\", "/").endswith(f"/{name}"))
        assert "seconds" in line and "FAILED" not in line


def test_weight_0_is_the_base_bit_for_bit(server: Server) -> None:
    alone = make(server, graphs.without_images(claims.ROWS))
    unweighted = make(server, graphs.with_images(claims.names("reference"), weight=0.0))
    full = make(server, graphs.with_images(claims.names("reference")))
    pairs = zip(alone, unweighted, full, strict=True)
    for one, same, other in pairs:
        assert np.array_equal(np.asarray(one), np.asarray(same))
        assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_weight_1_looks_as_the_reference(server: Server) -> None:
    made = make(server, graphs.with_images(claims.names("reference")))
    assert agreeing(made, claims.REFERENCES, "colour", "ground") == claims.ROWS
    turned = claims.REFERENCES[1:] + claims.REFERENCES[:1]
    assert agreeing(made, turned, "colour") == agreeing(made, turned, "ground") == 0


def test_text_says_what_is_where_and_the_reference_how_it_looks(server: Server) -> None:
    text = f"{claims.SHAPE} {claims.PLACE}"
    made = make(server, graphs.with_images(claims.names("reference"), text=text))
    assert agreeing(made, claims.REFERENCES, "colour", "ground") >= claims.ROWS - 1
    found = demo.readings(made)
    assert sum((r.shape, r.place) == (claims.SHAPE, claims.PLACE) for r in found) >= claims.ROWS - 1


def test_controlnet_decides_place_and_shape(server: Server) -> None:
    references, hints = claims.names("reference"), claims.names("hint")
    made = make(server, graphs.with_images(references, hints=hints))
    assert agreeing(made, claims.REFERENCES, "colour", "ground") >= claims.ROWS - 1
    for found, hint in zip(demo.readings(made), claims.HINTS, strict=True):
        assert found.mask is not None
        silhouette = world.coverage(hint) > 0.5
        shared = (found.mask & silhouette).sum() / (found.mask | silhouette).sum()
        assert shared > 0.7


def test_the_custom_model_keeps_its_style(server: Server) -> None:
    made = make(server, graphs.with_images(claims.names("reference"), fine_tuned=True))
    found = demo.readings(made)
    # On a dark ground a dark line is not to be seen.
    bright = [r.outlined for r in found if r.ground not in ("black", "navy")]
    assert len(bright) >= 2 and all(bright)
    assert agreeing(made, claims.REFERENCES, "colour", "ground") >= claims.ROWS - 1
