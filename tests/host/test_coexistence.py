"""Other packs in our place: whoever comes first, their attention and our image prompt both act.

What the picture must be is computed by hand: hooks on the UNet's own Linears add the image branch,
with plain torch, from the adapter's file. They know nothing of slots, wrappers or roles; which side
of guidance a row belongs to they read off its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ip_adapter.layers import SD15
from tests.host.conftest import Applier, Sampler, draw, text
from tests.synthetic.models import ADAPTER_BASE
from tests.tolerance import assert_close, relative_error

pytestmark = pytest.mark.host

Said = Sequence[tuple[Tensor, Tensor]]
"""Text states ``[77, D]`` and the image tokens ``[T, D]`` of the rows that have them."""


@dataclass(frozen=True)
class ByHand:
    """The decoupled attention of the paper, put under a UNet without the host's knowledge.

    Attributes:
        weights: The adapter's file.
        said: The image of the rows that have these texts.
        otherwise: The image tokens ``[T, D]`` of every other row.
    """

    weights: dict[str, Tensor]
    said: Said
    otherwise: Tensor

    @contextmanager
    def under(self, model: Any, weight: float = 1.0, mask: Tensor | None = None) -> Iterator[None]:
        """Add the image branch while the context lasts; the mask ``[H, W]`` is of the picture."""
        unet = model.model.diffusion_model
        handles: list[Any] = []
        number = 1
        try:
            for blocks in (unet.input_blocks, unet.output_blocks, unet.middle_block):
                for module in blocks.modules():
                    if type(module).__name__ != "SpatialTransformer":
                        continue
                    for block in module.transformer_blocks:
                        layer = _Layer(self, number, block.attn2.heads, weight, mask)
                        handles += layer.hook(module, block.attn2)
                        number += 2
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Layer:
    def __init__(
        self, hand: ByHand, number: int, heads: int, weight: float, mask: Tensor | None
    ) -> None:
        self.hand, self.heads, self.weight, self.mask = hand, heads, weight, mask
        self.key = hand.weights[f"ip_adapter.{number}.to_k_ip.weight"].float()
        self.value = hand.weights[f"ip_adapter.{number}.to_v_ip.weight"].float()
        self.query = self.text = torch.zeros(0)
        self.grid = (0, 0)

    def hook(self, transformer: nn.Module, attention: Any) -> list[Any]:
        def see_grid(_: nn.Module, given: Any) -> None:
            self.grid = tuple(given[0].shape[-2:])

        def see_query(_: nn.Module, __: Any, out: Tensor) -> None:
            self.query = out

        def see_text(_: nn.Module, given: Any) -> None:
            self.text = given[0]

        def add(_: nn.Module, given: Any) -> Any:
            return (given[0] + self.branch(), *given[1:])

        return [
            transformer.register_forward_pre_hook(see_grid),
            attention.to_q.register_forward_hook(see_query),
            attention.to_k.register_forward_pre_hook(see_text),
            attention.to_out.register_forward_pre_hook(add),
        ]

    def branch(self) -> Tensor:
        rows = torch.stack([self.tokens(text) for text in self.text])
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).movedim(2, 1)
            for x in (self.query, rows @ self.key.T, rows @ self.value.T)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        out = (scores.softmax(-1) @ value).movedim(1, 2).flatten(2)
        if self.mask is not None:
            place = nn.functional.adaptive_avg_pool2d(self.mask[None], self.grid)
            out = out * place.view(1, -1, 1)
        return self.weight * out

    def tokens(self, text: Tensor) -> Tensor:
        for said, tokens in self.hand.said:
            if torch.equal(text[: len(said)], said.to(text)):
                return tokens
        return self.hand.otherwise


@pytest.fixture(scope="session")
def hand(model_files: Path, apply: Applier) -> ByHand:
    """The prompt that `apply` makes, with the positive text that `sample` gives."""
    prompt = apply.prompt()
    (said, _), *_ = text(1)
    weights = load_file(model_files / ADAPTER_BASE)
    return ByHand(weights, [(said[0], prompt.conditional[0])], prompt.unconditional[0])


def mean_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """Another pack's replacement: every place gets the mean of the text's values."""
    return v.mean(1, keepdim=True).expand_as(q).contiguous()


class Moving:
    """A replacement like `mean_attention` that the host moves and asks for its models."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        self.asked.add("called")
        return mean_attention(q, k, v, extra_options)

    def to(self, target: Any) -> Moving:
        self.asked.add("to")
        return self

    def models(self) -> list[Any]:
        self.asked.add("models")
        return []


def replaced(model: Any, patch: Any = mean_attention, keys: int = 3) -> Any:
    """A clone with `patch` in every layer, by its address with or without the depth."""
    out = model.clone()
    for layer in SD15.layers:
        out.set_model_attn2_replace(patch, *layer.address[:keys])
    return out


def both(partner: Callable[[Any], Any], model: Any, apply: Applier, first: str, **how: Any) -> Any:
    """The partner's patch and ours, in the order named."""
    if first == "ours":
        return partner(apply(model, **how))
    return apply(partner(model), **how)


ORDERS = pytest.mark.parametrize("first", ["theirs", "ours"])


def test_by_hand_is_what_apply_does(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand
) -> None:
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(3))
    with hand.under(model, 0.7):
        expected = sample(model)
    assert_close(sample(apply(model, weight=0.7)), expected, relative=1e-4)
    with hand.under(model, 0.7, mask):
        masked = sample(model)
    assert_close(sample(apply(model, weight=0.7, mask=mask)), masked, relative=1e-4)
    assert relative_error(masked, expected) > 1e-3
    assert relative_error(expected, sample(model)) > 1e-3


@ORDERS
@pytest.mark.parametrize("keys", [2, 3])
def test_a_replacement_and_an_image_prompt_both_act(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, first: str, keys: int
) -> None:
    """The host keeps one replacement per layer; a pack that comes after ours overwrites it."""

    def partner(one: Any) -> Any:
        return replaced(one, keys=keys)

    theirs = partner(model)
    with hand.under(model):
        expected = sample(theirs)
    assert_close(sample(both(partner, model, apply, first)), expected, relative=1e-4)
    without = sample(theirs)
    assert torch.equal(sample(both(partner, model, apply, first, weight=0.0)), without)
    assert relative_error(expected, without) > 1e-3
    with hand.under(model):
        assert relative_error(expected, sample(model)) > 1e-3


@ORDERS
def test_a_replacement_of_some_layers_leaves_the_others_alone(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, first: str
) -> None:
    def partner(one: Any) -> Any:
        out = one.clone()
        for address in (("middle", 0), ("output", 4, 0)):
            out.set_model_attn2_replace(mean_attention, *address)
        return out

    with hand.under(model):
        expected = sample(partner(model))
    assert_close(sample(both(partner, model, apply, first)), expected, relative=1e-4)


@ORDERS
def test_the_host_still_looks_after_their_object(
    model: Any, apply: Applier, sample: Sampler, first: str
) -> None:
    theirs = Moving()
    sample(both(lambda one: replaced(one, theirs), model, apply, first), steps=1)
    assert theirs.asked == {"called", "to", "models"}


def test_overwriting_leaves_no_trace_on_what_it_was_cloned_from(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    patched = apply(model)
    before = sample(patched)
    sample(replaced(patched))
    assert torch.equal(sample(patched), before)


def test_two_image_prompts_around_a_replacement(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    """Apply, their patch, apply: their attention once, each image once."""
    expected = sample(apply(apply(replaced(model), seed=1), seed=2, weight=0.5))
    found = sample(apply(replaced(apply(model, seed=1)), seed=2, weight=0.5))
    assert_close(found, expected, relative=1e-4)


@ORDERS
def test_inputs_that_another_pack_changes(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, first: str
) -> None:
    """Lists of patches before and after the layer: they compose with whatever replaces it."""

    def before(n: Tensor, context: Tensor, value: Tensor, extra_options: Any) -> Any:
        return n * 0.5, torch.cat((context, context[:, :9]), 1), torch.cat((value, value[:, :9]), 1)

    def after(n: Tensor, extra_options: Any) -> Tensor:
        return n * 1.5

    def partner(one: Any) -> Any:
        out = one.clone()
        out.set_model_attn2_patch(before)
        out.set_model_attn2_output_patch(after)
        return out

    with hand.under(model):
        expected = sample(partner(model))
    assert_close(sample(both(partner, model, apply, first)), expected, relative=1e-4)
    assert relative_error(expected, sample(partner(model))) > 1e-3


@ORDERS
def test_a_replacement_for_one_extra_pass(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, first: str
) -> None:
    """Guidance by perturbed cross-attention: the patch exists in one call's options only."""
    import comfy.model_patcher
    import comfy.samplers

    def perturb(args: dict[str, Any]) -> Tensor:
        options = args["model_options"].copy()
        for layer in SD15.layers:
            options = comfy.model_patcher.set_model_options_patch_replace(
                options, mean_attention, "attn2", *layer.address
            )
        (out,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return args["denoised"] + 2 * (args["cond_denoised"] - out)  # type: ignore[no-any-return]

    def partner(one: Any) -> Any:
        out = one.clone()
        out.set_model_sampler_post_cfg_function(perturb)
        return out

    with hand.under(model):
        expected = sample(partner(model))
        assert relative_error(expected, sample(model)) > 1e-3
    assert_close(sample(both(partner, model, apply, first)), expected, relative=1e-4)


@pytest.mark.parametrize("scope", ["AllConditioning", "HookedOnly"])
def test_a_replacement_on_one_conditioning(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, scope: str
) -> None:
    """The host prefers what lies on the MODEL to what a conditioning's hook brings."""
    import comfy.hooks

    def hooked() -> Any:
        theirs = {layer.address: mean_attention for layer in SD15.layers}
        hook = comfy.hooks.TransformerOptionsHook(
            {"patches_replace": {"attn2": theirs}}, comfy.hooks.EnumHookScope[scope]
        )
        group = comfy.hooks.HookGroup()
        group.add(hook)
        return comfy.hooks.set_hooks_for_conditioning(text(1), group)

    with hand.under(model):
        expected = sample(model, positive=hooked())
        assert relative_error(expected, sample(model)) > 1e-3
    assert_close(sample(apply(model), positive=hooked()), expected, relative=1e-4)
    without = sample(model, positive=hooked())
    assert torch.equal(sample(apply(model, weight=0.0), positive=hooked()), without)


@ORDERS
def test_a_pack_that_adds_itself_to_what_it_finds(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, first: str
) -> None:
    """Old packs call ``add`` on whatever object the layer has, and install their own elsewhere."""

    class Chain:
        def __init__(self) -> None:
            self.scales: tuple[float, ...] = ()

        def add(self, callback: float) -> None:
            self.scales += (callback,)

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            return sum(self.scales) * mean_attention(q, k, v, options)

    def partner(one: Any) -> Any:
        out = one.clone()
        slots = out.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        for layer in SD15.layers:
            if layer.address not in slots:
                out.set_model_attn2_replace(Chain(), *layer.address)
            found = out.model_options["transformer_options"]["patches_replace"]["attn2"]
            found[layer.address].add(0.5)
        return out

    with hand.under(model):
        expected = sample(partner(model))
    assert_close(sample(both(partner, model, apply, first)), expected, relative=1e-4)


@ORDERS
@pytest.mark.parametrize("pictures", [1, 2])
def test_regional_prompts_repeat_the_positive_rows(
    model: Any, apply: Applier, sample: Sampler, hand: ByHand, first: str, pictures: int
) -> None:
    """Attention couples: in each layer the positive rows once per region, each with its text."""
    regions = [text(number)[0][0] for number in (11, 12)]
    sides: list[list[int]] = []

    def split(n: Tensor, context: Tensor, value: Tensor, extra_options: Any) -> Any:
        sides.append(extra_options["cond_or_uncond"])
        rows, texts = [], []
        for side, own, said in zip(
            sides[-1], n.split(pictures), context.split(pictures), strict=True
        ):
            others = [one.to(n).expand(pictures, -1, -1) for one in regions if side == 0]
            rows += [own] * (1 + len(others))
            texts += [said, *others]
        return torch.cat(rows), torch.cat(texts), torch.cat(texts)

    def merge(n: Tensor, extra_options: Any) -> Tensor:
        parts = iter(n.split(pictures))
        return torch.cat(
            [
                0.5 * next(parts) + 0.3 * next(parts) + 0.2 * next(parts)
                if side == 0
                else next(parts)
                for side in sides.pop()
            ]
        )

    def partner(one: Any) -> Any:
        out = one.clone()
        out.set_model_attn2_patch(split)
        out.set_model_attn2_output_patch(merge)
        return out

    noise = draw(pictures, 4, 8, 8)
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(3))
    image = hand.said[0][1]
    everywhere = [*hand.said, *((region[0], image) for region in regions)]
    with ByHand(hand.weights, everywhere, hand.otherwise).under(model, 1.0, mask):
        expected = sample(partner(model), noise=noise)
        assert relative_error(expected, sample(model, noise=noise)) > 1e-4
    found = sample(both(partner, model, apply, first, mask=mask), noise=noise)
    assert_close(found, expected, relative=1e-4)


def test_rows_that_nobody_can_tell_apart_are_refused(
    model: Any, apply: Applier, sample: Sampler
) -> None:
    def odd(n: Tensor, context: Tensor, value: Tensor, extra_options: Any) -> Any:
        return n[:1], context[:1], value[:1]

    patched = apply(model)
    patched.set_model_attn2_patch(odd)
    with pytest.raises(Exception, match="1 rows where the sampler announced 2"):
        sample(patched, steps=1)
