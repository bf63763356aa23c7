"""A reference for each picture of a batch, as animations have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.conftest import Applier, Sampler, draw
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host


def framed(host: Any, apply: Applier, count: int) -> tuple[Any, list[Any]]:
    """One prompt with a reference for each of `count` frames, and a prompt for each of them."""
    library = host.library("ip_adapter.prompt")
    tokens = draw(count + 1, 4, 768, seed=5)
    adapter = apply.adapter
    parts = [
        library.from_tokens(one[None], tokens[:1], adapter.fingerprint, adapter.label)
        for one in tokens[1:]
    ]
    together = library.from_tokens(
        tokens[1:], tokens[:1], adapter.fingerprint, adapter.label, frames=count
    )
    return together, parts


def put(host: Any, model: Any, apply: Applier, prompt: Any, **influence: Any) -> Any:
    return host.library("ip_adapter.host.patching").apply(
        model, apply.adapter, prompt, **influence
    )[0]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_every_frame_has_its_own_reference(
    host: Any, model: Any, apply: Applier, sample: Sampler, cfg: float
) -> None:
    """The last reference serves the frames that have none."""
    prompt, parts = framed(host, apply, 3)
    noise = draw(5, 4, 8, 8)
    found = sample(put(host, model, apply, prompt), noise=noise, cfg=cfg)
    for i in range(5):
        own = put(host, model, apply, parts[min(i, 2)])
        assert_close(found[i], sample(own, noise=noise[i : i + 1], cfg=cfg)[0], relative=1e-4)
    other = sample(put(host, model, apply, parts[0]), noise=noise, cfg=cfg)
    assert relative_error(found[1], other[1]) > 1e-3


def test_one_frame_is_a_plain_prompt(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    prompt, (part,) = framed(host, apply, 1)
    found = sample(put(host, model, apply, prompt))
    assert torch.equal(found, sample(put(host, model, apply, part)))


def test_context_windows_keep_every_frames_reference(
    host: Any, model: Any, apply: Applier, sample: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of four of six frames: each row's keys are those of its place in the whole batch."""
    import comfy.context_windows as windows

    prompt, parts = framed(host, apply, 6)
    patched = put(host, model, apply, prompt)
    patched.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(
            windows.ContextSchedules.STATIC_STANDARD
        ),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT),
        context_length=4,
        context_overlap=1,
        dim=0,
    )
    windows.create_prepare_sampling_wrapper(patched)
    seen: list[tuple[Any, Any]] = []
    run = host.library("ip_adapter.host.run").Run
    original = run.live

    def spy(self: Any, chunks: Any, sigma: Tensor, device: Any) -> Any:
        live = original(self, chunks, sigma, device)
        seen.append((chunks, live["input", 1, 0][0].key))
        return live

    monkeypatch.setattr(run, "live", spy)
    sample(patched, noise=draw(6, 4, 8, 8), steps=1)
    weight = apply.adapter.module.state_dict()["ip_adapter.1.to_k_ip.weight"].float()
    frames = set()
    for chunks, keys in seen:
        row = 0
        for chunk in chunks:
            for frame in chunk.frames:
                part = parts[frame]
                tokens = part.conditional if chunk.is_positive else part.unconditional
                expected = tokens[0] @ weight.T  # [T, C]
                found = keys[row].transpose(0, 1).flatten(1)  # [H, T, D] -> [T, C]
                assert_close(found, expected, relative=1e-5)
                frames.add(frame)
                row += 1
    assert frames == set(range(6)) and len(seen) > 1


def test_frames_mix_with_a_plain_prompt_and_with_opposed_layers(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    prompt, parts = framed(host, apply, 2)
    influence = host.library("ip_adapter.influence").Influence(layers="style transfer precise")
    noise = draw(2, 4, 8, 8)

    def chain(first: Any) -> Any:
        return apply(put(host, model, apply, first, influence=influence), seed=9, weight=0.5)

    found = sample(chain(prompt), noise=noise)
    for i in range(2):
        alone = sample(chain(parts[i]), noise=noise[i : i + 1])
        assert_close(found[i], alone[0], relative=1e-4)


@pytest.mark.parametrize("scaling", ["V only", "K+mean(V) w/ C penalty"])
@pytest.mark.parametrize("has_own_references", [False, True])
def test_every_frame_has_its_own_weight(
    host: Any,
    model: Any,
    apply: Applier,
    sample: Sampler,
    scaling: str,
    has_own_references: bool,
) -> None:
    """The last weight serves the frames that have none; a mask and a window do as ever."""
    influence = host.library("ip_adapter.influence").Influence
    prompt, parts = framed(host, apply, 4) if has_own_references else (apply.prompt(), [])
    weights = (1.0, 0.0, 0.4)
    noise = draw(4, 4, 8, 8)
    mask = torch.zeros(64, 64)
    mask[:, 24:] = 1
    shared: dict[str, Any] = {"mask": mask, "end": 0.8, "scaling": scaling}
    patched = put(
        host, model, apply, prompt, weight=1.2, influence=influence(frames=weights, **shared)
    )
    found = sample(patched, noise=noise)
    for i in range(4):
        weight = 1.2 * weights[min(i, 2)]
        own = parts[i] if has_own_references else prompt
        alone = put(host, model, apply, own, weight=weight, influence=influence(**shared))
        assert_close(found[i], sample(alone, noise=noise[i : i + 1])[0], relative=1e-4)
    assert_close(found[1], sample(model, noise=noise[1:2])[0], relative=1e-4)


def test_weights_of_frames_that_are_all_zero_are_the_base_model(
    host: Any, model: Any, apply: Applier, sample: Sampler
) -> None:
    influence = host.library("ip_adapter.influence").Influence(frames=(0.0, 0.0))
    noise = draw(2, 4, 8, 8)
    assert torch.equal(
        sample(apply(model, influence=influence), noise=noise), sample(model, noise=noise)
    )
