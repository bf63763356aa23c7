"""Projections: image features -> image tokens.

Attribute names equal the published checkpoint keys, so that loading is a plain strict
``load_state_dict``. Layers are built through `ops`, which is ``torch.nn`` or the host's casting
twin, so the same module trains, is tested without ComfyUI, and runs in ComfyUI's memory.

Class names are the published ones. Source: section 3.2 of the paper (global), the fine-grained
variant described there, and the projections of the FaceID, InstantID, Kolors and Instruct releases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .errors import IncompatibleModelError
from .spec import (
    FacePerceiverProjection,
    FaceProjection,
    FaceResamplerProjection,
    InstructProjection,
    LinearProjection,
    PatchProjection,
    Projection,
    ResamplerProjection,
)

HEAD_WIDTH = 64
"""Width of one attention head in every published resampler."""

Device = torch.device | str | None


class Ops(Protocol):
    """The two kinds of layers that projections and adapters are made of."""

    Linear: Any
    LayerNorm: Any


@dataclass(frozen=True, eq=False)
class Features:
    """What projections read; each reads some of it and refuses to run without.

    Attributes:
        image: Of an image encoder, ``[N, E]`` pooled or ``[N, P, E]`` hidden.
        face: Of a face recogniser, ``[N, 512]``, normed or raw as the projection needs.
        instruction: Text states of what to take from the image, ``[N, 77, 768]``.
        prompt: Text states of the picture to be made, ``[N, 77, 768]``.
        structure: Weight of the face's structure against its identity, where the two are summed.
    """

    image: Tensor | None = None
    face: Tensor | None = None
    instruction: Tensor | None = None
    prompt: Tensor | None = None
    structure: float = 1.0

    def need(self, name: str) -> Tensor:
        """Return one of the tensors.

        Raises:
            IncompatibleModelError: It is not there.
        """
        found: Tensor | None = getattr(self, name)
        if found is None:
            words = {"image": "features of an image encoder", "face": "a face vector"}
            raise IncompatibleModelError(
                f"This adapter needs {words.get(name, f'the text states of the {name}')}, and none "
                "were given. Use the encode node that has an input for it."
            )
        return found


class ImageProjModel(nn.Module):
    """Global image prompt: one linear layer cut into tokens, then a LayerNorm.

    Source: h94/IP-Adapter ``ip-adapter_sd15``; keys ``proj.*`` and ``norm.*``.
    """

    def __init__(self, spec: LinearProjection, ops: Ops, device: Device) -> None:
        super().__init__()
        self.tokens = spec.tokens
        self.proj = ops.Linear(spec.features, spec.tokens * spec.width, device=device)
        self.norm = ops.LayerNorm(spec.width, device=device)

    def forward(self, embeds: Tensor) -> Tensor:
        """``[N, E]`` pooled embeddings -> ``[N, T, D]`` image tokens."""
        tokens = rearrange(self.proj(embeds), "n (t d) -> n t d", t=self.tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]


class MLPProjModel(nn.Module):
    """Full image prompt: each patch feature becomes a token of its own.

    Source: h94/IP-Adapter ``ip-adapter-full-face_sd15``; keys ``proj.{0,2,3}.*``.
    """

    def __init__(self, spec: PatchProjection, ops: Ops, device: Device) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ops.Linear(spec.features, spec.features, device=device),
            nn.GELU(),
            ops.Linear(spec.features, spec.width, device=device),
            ops.LayerNorm(spec.width, device=device),
        )

    def forward(self, features: Tensor) -> Tensor:
        """``[N, P, E]`` patch features -> ``[N, P, D]`` image tokens."""
        return self.proj(features)  # type: ignore[no-any-return]


class _Identity(nn.Module):
    """Two Linears and a LayerNorm that make tokens of a face vector."""

    def __init__(self, spec: FaceProjection, ops: Ops, device: Device) -> None:
        super().__init__()
        self.tokens = spec.tokens
        self.proj = nn.Sequential(
            ops.Linear(spec.features, spec.inner, device=device),
            nn.GELU(),
            ops.Linear(spec.inner, spec.tokens * spec.width, device=device),
        )
        self.norm = ops.LayerNorm(spec.width, device=device)

    def identity(self, face: Tensor) -> Tensor:
        """``[N, 512]`` face vectors -> ``[N, T, D]`` identity tokens."""
        tokens = rearrange(self.proj(face), "n (t d) -> n t d", t=self.tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]


class MLPProjModelFaceId(_Identity):
    """A face's identity as a few tokens.

    Source: h94/IP-Adapter-FaceID ``ip-adapter-faceid_sd15``; keys ``proj.{0,2}.*`` and ``norm.*``.
    """

    def forward(self, face: Tensor) -> Tensor:
        """``[N, 512]`` face vectors -> ``[N, T, D]`` identity tokens."""
        return self.identity(face)


class PerceiverAttention(nn.Module):
    """Queries read the image features and themselves.

    Keys and values come from the normed features followed by the normed queries, so the queries
    also attend to one another.
    """

    def __init__(self, spec: ResamplerProjection, ops: Ops, device: Device) -> None:
        super().__init__()
        self.heads = spec.heads
        across = spec.heads * HEAD_WIDTH
        self.norm1 = ops.LayerNorm(spec.inner, device=device)
        self.norm2 = ops.LayerNorm(spec.inner, device=device)
        self.to_q = ops.Linear(spec.inner, across, bias=False, device=device)
        self.to_kv = ops.Linear(spec.inner, across * 2, bias=False, device=device)
        self.to_out = ops.Linear(across, spec.inner, bias=False, device=device)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """``[N, P, W]`` features and ``[N, T, W]`` latents -> ``[N, T, W]``."""
        features, latents = self.norm1(features), self.norm2(latents)
        q = rearrange(self.to_q(latents), "n t (h d) -> n h t d", h=self.heads)
        k, v = rearrange(
            self.to_kv(torch.cat((features, latents), dim=1)),
            "n p (two h d) -> two n h p d",
            two=2,
            h=self.heads,
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "n h t d -> n t (h d)"))  # type: ignore[no-any-return]


def _stack(spec: ResamplerProjection, hidden: int, ops: Ops, device: Device) -> nn.ModuleList:
    """Layers of attention and feed-forward, `hidden` wide inside the latter."""
    return nn.ModuleList(
        nn.ModuleList(
            [
                PerceiverAttention(spec, ops, device),
                nn.Sequential(
                    ops.LayerNorm(spec.inner, device=device),
                    ops.Linear(spec.inner, hidden, bias=False, device=device),
                    nn.GELU(),
                    ops.Linear(hidden, spec.inner, bias=False, device=device),
                ),
            ]
        )
        for _ in range(spec.depth)
    )


def _read(layer: nn.Module, features: Tensor, latents: Tensor) -> Tensor:
    attention, feed_forward = cast(nn.ModuleList, layer)
    latents = attention(features, latents) + latents
    return cast(Tensor, feed_forward(latents) + latents)


class _Perceiver(nn.Module):
    """Queries read features through a few layers, then one Linear and a LayerNorm."""

    def __init__(self, spec: ResamplerProjection, ops: Ops, device: Device) -> None:
        super().__init__()
        self.proj_in = ops.Linear(spec.features, spec.inner, device=device)
        self.proj_out = ops.Linear(spec.inner, spec.width, device=device)
        self.norm_out = ops.LayerNorm(spec.width, device=device)
        self.layers = _stack(spec, spec.hidden, ops, device)

    def read(self, features: Tensor, latents: Tensor) -> Tensor:
        """``[N, P, E]`` features and ``[N, T, W]`` queries -> ``[N, T, D]`` tokens."""
        features = self.proj_in(features)
        for layer in self.layers:
            latents = _read(layer, features, latents)
        return self.norm_out(self.proj_out(latents))  # type: ignore[no-any-return]


class FacePerceiverResampler(_Perceiver):
    """Queries that come from outside read patch features.

    Source: the ``perceiver_resampler`` of h94/IP-Adapter-FaceID ``ip-adapter-faceid-plus_sd15``.
    """

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """``[N, P, E]`` features and ``[N, T, W]`` queries -> ``[N, T, D]`` tokens."""
        return self.read(features, latents)


class _LearnedQueries(_Perceiver):
    """A perceiver whose queries are parameters."""

    def __init__(self, spec: ResamplerProjection, ops: Ops, device: Device) -> None:
        super().__init__(spec, ops, device)
        self.latents = nn.Parameter(torch.empty(1, spec.tokens, spec.inner, device=device))
        if self.latents.device.type != "meta":
            nn.init.normal_(self.latents, std=spec.inner**-0.5)

    def queries(self, features: Tensor) -> Tensor:
        """The learned queries, ``[N, T, W]``, once for each row of `features`."""
        # Under the host's memory management a bare parameter may lie on another device.
        return repeat(self.latents.to(features), "1 t w -> n t w", n=features.shape[0])


class Resampler(_LearnedQueries):
    """Fine-grained image prompt: learned queries read the patch features through a few layers.

    Source: h94/IP-Adapter ``ip-adapter-plus_sd15``; 51 keys. InstantID and the unnormalised
    portrait read a face vector with it, as a sequence of one.
    """

    def forward(self, features: Tensor) -> Tensor:
        """``[N, P, E]`` patch features -> ``[N, T, D]`` image tokens."""
        return self.read(features, self.queries(features))


class ProjModelFaceIdPlus(_Identity):
    """Identity tokens of a face read its structure from the patch features of its crop.

    With the shortcut of V2 the result is ``identity + structure * read``; without it, ``read``.
    Source: h94/IP-Adapter-FaceID ``ip-adapter-faceid-plusv2_sd15``.
    """

    def __init__(self, spec: FacePerceiverProjection, ops: Ops, device: Device) -> None:
        super().__init__(spec.identity, ops, device)
        self.shortcut = spec.shortcut
        self.perceiver_resampler = FacePerceiverResampler(spec.resampler, ops, device)

    def forward(self, face: Tensor, features: Tensor, structure: float = 1.0) -> Tensor:
        """``[N, 512]`` faces and ``[N, P, E]`` patch features -> ``[N, T, D]`` tokens."""
        identity = self.identity(face)
        read = self.perceiver_resampler(features, identity)
        return identity + structure * read if self.shortcut else read  # type: ignore[no-any-return]


class InstructResampler(_LearnedQueries):
    """A resampler whose queries read, in each layer, the image, the prompt and the instruction.

    Source: CiaraRowles/IP-Adapter-Instruct ``ip-adapter-instruct-sd15``; 143 keys.
    """

    def __init__(self, spec: InstructProjection, ops: Ops, device: Device) -> None:
        super().__init__(spec.resampler, ops, device)
        inner = spec.resampler.inner
        self.proj_new_input = ops.Linear(spec.text_features, inner, device=device)
        self.proj_prompt_input = ops.Linear(spec.text_features, inner, device=device)
        self.new_input_layers = _stack(spec.resampler, spec.text_hidden, ops, device)
        self.prompt_layers = _stack(spec.resampler, spec.text_hidden, ops, device)

    def forward(self, features: Tensor, instruction: Tensor, prompt: Tensor) -> Tensor:
        """``[N, P, E]`` features and ``[N, 77, 768]`` text states -> ``[N, T, D]`` tokens."""
        latents = self.queries(features)
        features = self.proj_in(features)
        instruction = self.proj_new_input(instruction)
        prompt = self.proj_prompt_input(prompt)
        for image_layer, prompt_layer, instruction_layer in zip(
            self.layers, self.prompt_layers, self.new_input_layers, strict=True
        ):
            latents = _read(image_layer, features, latents)
            latents = _read(prompt_layer, prompt, latents)
            latents = _read(instruction_layer, instruction, latents)
        return self.norm_out(self.proj_out(latents))  # type: ignore[no-any-return]


def build_projection(spec: Projection, ops: Ops, device: Device = None) -> nn.Module:
    """Build the module that a projection's spec describes."""
    match spec:
        case LinearProjection():
            return ImageProjModel(spec, ops, device)
        case ResamplerProjection():
            return Resampler(spec, ops, device)
        case PatchProjection():
            return MLPProjModel(spec, ops, device)
        case FaceProjection():
            return MLPProjModelFaceId(spec, ops, device)
        case FacePerceiverProjection():
            return ProjModelFaceIdPlus(spec, ops, device)
        case FaceResamplerProjection():
            return Resampler(spec.resampler, ops, device)
        case InstructProjection():
            return InstructResampler(spec, ops, device)
    raise TypeError(f"unsupported projection {spec!r}")


def project(module: nn.Module, spec: Projection, features: Features) -> Tensor:
    """Run a projection's module on what it reads.

    Returns:
        ``[N, T, D]`` image tokens.

    Raises:
        IncompatibleModelError: Something that the projection reads was not given.
    """
    match spec:
        case LinearProjection() | ResamplerProjection() | PatchProjection():
            tokens = module(features.need("image"))
        case FaceProjection():
            tokens = module(features.need("face"))
        case FaceResamplerProjection():
            tokens = module(features.need("face")[:, None])
        case FacePerceiverProjection():
            tokens = module(features.need("face"), features.need("image"), features.structure)
        case InstructProjection():
            tokens = module(*(features.need(name) for name in ("image", "instruction", "prompt")))
    return cast(Tensor, tokens)
