"""Fades, noise and prepared references on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.host.conftest import Applier, Sampler, draw
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

PARTS = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("timing", ["linear", "ease_in", "ease_out", "ease_in_out"])
def test_each_picture_of_a_fade_is_made_with_the_mixed_tokens(
    host: Any, model: Any, apply: Applier, sample: Sampler, timing: str
) -> None:
    first, second = apply.prompt(1), apply.prompt(2)
    (faded,) = host.node("ImagePromptFade").execute(first, second, 5, timing).args
    patching, prompts = host.library("ip_adapter.host.patching"), host.library("ip_adapter.prompt")
    curve = {
        "linear": lambda x: x,
        "ease_in": lambda x: np.sin(x * np.pi / 2),
        "ease_out": lambda x: 1 - np.cos(x * np.pi / 2),
        "ease_in_out": lambda x: (1 - np.cos(x * np.pi)) / 2,
    }[timing]

    def sampled(prompt: Any, noise: Any) -> Any:
        return sample(patching.apply(model, apply.adapter, prompt)[0], noise=noise)

    noise = draw(6, 4, 8, 8)
    found = sampled(faded, noise)
    for i, x in enumerate([*PARTS, 1.0]):  # the sixth follows the second prompt
        part = float(curve(x))
        mixed = prompts.from_tokens(
            first.conditional * (1 - part) + second.conditional * part,
            first.unconditional * (1 - part) + second.unconditional * part,
            *(first.adapter, first.label),
        )
        assert_close(found[i], sampled(mixed, noise[i : i + 1])[0], relative=1e-4)
    assert relative_error(found[2], sampled(first, noise[2:3])[0]) > 1e-3


def test_prompts_of_two_adapters_do_not_fade(host: Any, apply: Applier, plus_adapter: Any) -> None:
    errors = host.library("ip_adapter.errors")
    other = Applier(host, plus_adapter).prompt()
    with pytest.raises(errors.IncompatibleModelError, match="cannot fade"):
        host.node("ImagePromptFade").execute(apply.prompt(), other, 4, "linear")
    with pytest.raises(errors.IncompatibleModelError, match="4 tokens and the second 8"):
        host.node("ImagePromptFade").execute(apply.prompt(), apply.prompt(count=2), 4, "linear")


def test_noise_is_a_negative_reference(host: Any) -> None:
    (noise,) = host.node("ImagePromptNoise").execute("fade", 1.0, 0).args
    expected = torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise, expected)
    reference = host.node("ImagePromptReference").execute(noise, 1.0, "crop", "negative")
    ((added,),) = reference.args
    assert added.is_negative


def test_noise_is_that_of_the_old_node(host: Any) -> None:
    image = draw(1, 100, 200, 3).sigmoid()
    for kind in ("fade", "dissolve", "gaussian", "shuffle"):
        (ours,) = host.node("ImagePromptNoise").execute(kind, 0.6, 3, image).args
        (old,) = host.node("IPAdapterNoise").execute(kind, 0.6, 3, image).args
        assert torch.equal(ours, old)


@pytest.mark.parametrize("position", ["center", "top", "bottom", "left", "right"])
def test_preparing_takes_the_square_at_a_side(host: Any, position: str) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    image = torch.from_numpy(levels)[None] / 255
    (found,) = host.node("ImagePromptPrepare").execute(image, position, 56, 0.0).args
    top = {"top": 0, "bottom": 30}.get(position, 15)
    square = Image.fromarray(levels).crop((0, top, 60, top + 60))
    expected = np.asarray(square.resize((56, 56), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(found[0].numpy() * 255, expected, atol=1e-3)


def test_what_preparing_adds_or_cannot_see_is_clips_mean_colour(host: Any) -> None:
    """Zero after normalisation: it says nothing to the encoder."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    image = torch.cat((torch.ones(1, 40, 80, 3), torch.zeros(1, 40, 80, 1)), -1)
    image[:, :, 40:, 3] = 1
    (found,) = host.node("ImagePromptPrepare").execute(image, "pad", 80, 0.0).args
    assert found.shape == (1, 80, 80, 3)
    for outside in (found[0, :18], found[0, 62:], found[0, 20:60, :36]):
        assert float((outside - mean).abs().max()) < 1.01 / 255
    assert bool((found[0, 24:56, 46:] > 0.99).all())


def test_a_grey_picture_can_be_prepared_and_sharpened(host: Any) -> None:
    image = draw(2, 90, 120, 1).sigmoid()
    plain, sharp = (
        host.node("ImagePromptPrepare").execute(image, "center", 56, s).args[0] for s in (0.0, 1.0)
    )
    assert plain.shape == sharp.shape == (2, 56, 56, 3)
    assert float(sharp.std()) > 1.2 * float(plain.std())


def test_what_is_no_picture_is_refused(host: Any) -> None:
    errors = host.library("ip_adapter.errors")
    with pytest.raises(errors.ImageError, match="shape"):
        host.node("ImagePromptPrepare").execute(torch.zeros(8, 8, 3), "center", 56, 0.0)
