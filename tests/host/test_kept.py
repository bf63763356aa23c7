"""What is encoded twice is computed once, and kept no longer than what computed it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import NARROW
from tests.host.conftest import draw
from tests.host.test_encoding import HIDDEN, clip_vision, pictures
from tests.synthetic import adapters
from tests.tolerance import assert_close

pytestmark = pytest.mark.host


class Owner:
    pass


@pytest.fixture
def kept(host: Any) -> Any:
    return host.library("ip_adapter.host.kept")


def test_the_same_content_is_computed_once(kept: Any) -> None:
    results, owner, calls = kept.Kept(1000, kept.size_of), Owner(), []

    def make() -> Tensor:
        calls.append(1)
        return torch.zeros(10)

    first = results.get(owner, "a", make)
    assert results.get(owner, "a", make) is first and len(calls) == 1
    assert results.get(owner, "b", make) is not first
    assert results.get(Owner(), "a", make) is not first
    assert len(calls) == 3


def test_the_oldest_go_when_there_are_too_many_bytes(kept: Any) -> None:
    results, owner = kept.Kept(100, kept.size_of), Owner()
    made = {key: results.get(owner, key, lambda: torch.zeros(10)) for key in "ab"}  # 40 bytes each
    assert results.get(owner, "a", lambda: torch.zeros(10)) is made["a"]
    results.get(owner, "c", lambda: torch.zeros(10))
    assert results.get(owner, "a", lambda: torch.ones(10)) is made["a"]
    assert float(results.get(owner, "b", lambda: torch.ones(10)).sum()) == 10
    large = results.get(owner, "large", lambda: torch.zeros(13))
    assert results.get(owner, "large", lambda: torch.zeros(13)) is not large


def test_nothing_outlives_its_owner(kept: Any) -> None:
    results, owner = kept.Kept(1000, kept.size_of), Owner()
    found = weakref.ref(results.get(owner, "a", lambda: torch.zeros(10)))
    assert found() is not None
    del owner
    gc.collect()
    assert found() is None


def test_a_digest_tells_numbers_shapes_and_precision_apart(kept: Any) -> None:
    x = draw(2, 3)
    variants = [x, x.t(), x.view(6), x.half(), x.bfloat16(), x + 1e-6, x[:1]]
    assert len({kept.digest(each) for each in variants}) == len(variants)
    assert kept.digest(x, None) != kept.digest(None, x)
    assert kept.digest(x.t().contiguous()) == kept.digest(x.t())


@pytest.fixture
def vision(host: Any) -> Any:
    return clip_vision()


@pytest.fixture
def plus(host: Any, tmp_path: Path) -> Any:
    tensors = adapters.plus_sd15(NARROW, features=HIDDEN, inner=64, heads=1, depth=1)
    path = adapters.write_safetensors(tensors, tmp_path / "plus")
    return host.library("ip_adapter.host.adapters").load(path)


@pytest.fixture
def runs(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each run of the encoder had."""
    library = host.library("ip_adapter.host.vision")
    seen: list[int] = []
    original = library._run

    def spy(model: Any, pixels: Tensor) -> Any:
        seen.append(len(pixels))
        return original(model, pixels)

    monkeypatch.setattr(library, "_run", spy)
    return seen


def test_equal_pictures_give_the_same_prompt_and_run_the_encoder_once(
    host: Any, plus: Any, vision: Any, runs: list[int]
) -> None:
    """Keys and values are kept with a prompt, so they are not computed anew either."""
    encode = host.library("ip_adapter.host.encoding").encode
    first = encode(plus, vision, pictures(2), "crop")
    seen = list(runs)
    assert sum(seen) == 3  # two pictures and "no image"
    assert encode(plus, vision, pictures(2).clone(), "crop") is first
    assert runs == seen
    others = [
        encode(plus, vision, pictures(2), "pad"),
        encode(plus, vision, pictures(2), "crop", per_frame=True),
        encode(plus, vision, pictures(2) * 0.9, "crop"),
        encode(plus, vision, pictures(2), "crop", unconditional="black picture"),
        encode(plus, clip_vision(), pictures(2), "crop"),
    ]
    assert all(other is not first for other in others)


def test_what_is_encoded_goes_with_its_encoder_and_adapter(
    host: Any, plus: Any, runs: list[int]
) -> None:
    encode = host.library("ip_adapter.host.encoding").encode
    vision = clip_vision()
    features = host.library("ip_adapter.host.reading")._features
    encode(plus, vision, pictures(1), "crop")
    gone = weakref.ref(vision)
    before = len(features._by_owner)
    del vision
    gc.collect()
    assert gone() is None and len(features._by_owner) < before


@pytest.mark.parametrize("frames", [1, 70])
def test_many_pictures_are_encoded_in_slices(
    host: Any,
    plus: Any,
    vision: Any,
    runs: list[int],
    monkeypatch: pytest.MonkeyPatch,
    frames: int,
) -> None:
    """The features of a thousand frames never lie in memory together."""
    encoding = host.library("ip_adapter.host.encoding")
    sizes: list[int] = []
    original = encoding._project

    def spy(adapter: Any, features: Any) -> Tensor:
        sizes.append(len(features.image))
        return original(adapter, features)

    image = pictures(70, 32, 32)
    monkeypatch.setattr(encoding, "_project", spy)
    found = encoding.encode(plus, vision, image, "crop", per_frame=frames > 1)
    assert sizes == [32, 32, 6, 1] and sum(runs) == 71
    monkeypatch.setattr(encoding, "_SLICE", 1000)
    whole = encoding.encode(plus, vision, image, "crop", per_frame=frames > 1)
    assert found.conditional.shape == whole.conditional.shape
    assert found.frames == whole.frames == frames
    assert_close(found.conditional, whole.conditional)
    assert_close(found.unconditional, whole.unconditional)


def test_many_features_are_projected_in_slices(
    host: Any, plus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all features are there already, as with the old nodes or a file of them."""
    encoding = host.library("ip_adapter.host.encoding")
    features = host.library("ip_adapter.projections").Features
    sizes: list[int] = []
    original = plus.module.image_tokens

    def spy(given: Any) -> Tensor:
        sizes.append(len(given.image))
        return original(given)

    monkeypatch.setattr(plus.module, "image_tokens", spy)
    many, none = draw(70, 5, HIDDEN), torch.zeros(1, 5, HIDDEN)
    found = encoding.from_features(plus, features(image=many), features(image=none), frames=70)
    assert sizes == [32, 32, 6, 1] and found.frames == 70
    whole = original(features(image=many))
    assert_close(found.conditional, whole.to(found.conditional))
