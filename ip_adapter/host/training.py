"""Training on the host's models: a frozen, differentiable copy of a UNet, and a fresh adapter.

The image reaches the copy through the patch that inference uses: a `patching.Slot` in every
cross-attention layer, and live branches in the transformer options; only that keys and values
come with gradients. The MODEL itself is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import attention
from ..adapter import ImageKeyValue, IPAdapter
from ..encoders import Encoder
from ..errors import IncompatibleModelError
from ..layers import Address
from ..objective import KeysValues, Schedule, Target, usable
from ..spec import AdapterSpec, Projection, encoder_for
from . import unet
from .branch import Branch, Chunk
from .patching import Slot

_LATENT = 8
"""Pixels per latent pixel, each way."""

Record = Callable[[int, Tensor, Tensor], None]
"""Gets a layer's number, what its text branch gave ``[B, L, C]``, and what the image added."""


@contextmanager
def training_mode() -> Iterator[None]:
    """Let gradients be computed here, where the host executes nodes in inference mode.

    Forward *and* backward passes belong in it. The host's own switch, which keeps its fused kernels
    off, is put back afterwards.
    """
    management: Any = comfy.model_management
    before = getattr(management, "in_training", False)
    management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.in_training = before


def family_spec(model: Any, projection: Projection, encoder: Encoder | None = None) -> AdapterSpec:
    """Say which adapter would be trained for a MODEL.

    Args:
        model: The host's MODEL.
        projection: Of the adapter.
        encoder: Whose features it reads; found by their width unless given.

    Raises:
        IncompatibleModelError: The model is of no family that adapters are made for, or its
            text tokens have another width than the projection makes.
    """
    layers = unet.cross_attention_layers(model)
    family = unet.family_of(model, layers)
    if family is None:
        width = max((layer.context_width for layer in layers), default=0)
        raise IncompatibleModelError(
            f"The model has {len(layers)} cross-attention layers of context width {width}, which "
            "is no family that adapters are made for. Load a checkpoint of SD 1.5, SD 2.x or SDXL."
        )
    if projection.width != family.context_width:
        raise IncompatibleModelError(
            f"The projection makes tokens of width {projection.width}, the text tokens of "
            f"{family.name} are {family.context_width} wide. Make the projection as wide."
        )
    width_at = {layer.address: layer.width for layer in layers}
    widths = tuple(width_at[layer.address] for layer in family.layers)
    known = encoder or encoder_for(projection)
    return AdapterSpec(family, projection, widths, variant=projection.layout, encoder=known)


def new_adapter(spec: AdapterSpec, model: Any) -> IPAdapter:
    """Build an untrained adapter for a MODEL: keys and values are the text's, the rest is random.

    The projection is as torch makes it; seed torch's generator for a repeatable one.

    Args:
        spec: See `family_spec`.
        model: The host's MODEL; its text keys and values are copied as they are without patches.

    Returns:
        The adapter on the CPU, in float32, with gradients.

    Raises:
        IncompatibleModelError: The adapter does not fit the model.
    """
    unet.match(spec, model, "The adapter to train")
    diffusion = _diffusion_model(model)
    with torch.inference_mode(False):
        adapter = IPAdapter(spec, nn, "cpu")
        for layer in spec.family.layers:
            text = _transformer(diffusion, layer.address).attn2
            pair = cast(ImageKeyValue, adapter.ip_adapter[str(layer.index)])
            for ours, theirs in ((pair.to_k_ip, text.to_k), (pair.to_v_ip, text.to_v)):
                ours.weight.data.copy_(theirs.weight.detach().clone().float())
    return adapter.float().requires_grad_(True)


class TrainableModel:
    """A frozen copy of a MODEL's UNet that gradients flow through.

    It is a copy because the host's own may be cast, offloaded or moved between two passes, and
    because weights that were made in inference mode cannot take part in a backward pass. All of it
    is of one precision and on one device.

    Args:
        model: The host's MODEL. Its weight patches (LoRA) are in the copy; its attention patches
            are not.
        dtype: What the copy computes in.
        gradient_checkpointing: Compute the blocks again in the backward pass instead of keeping
            what they computed: less memory, about a third more time.

    Raises:
        IncompatibleModelError: The model is no UNet, has extra input channels (inpainting), is
            quantised, or its diffusion is not the discrete one of Stable Diffusion.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.layers = unet.cross_attention_layers(model)
        self.family = unet.family_of(model, self.layers)
        self.schedule = schedule_of(model)
        self.dtype = dtype
        self._model = model.model
        if getattr(model.model, "concat_keys", ()):
            raise IncompatibleModelError(
                "The model is for inpainting: its UNet reads a mask and a picture beside the "
                "latent. Train on the family's usual checkpoint; the adapter serves both."
            )
        self._unet = _copy(model, dtype)
        if gradient_checkpointing:
            _checkpoint_blocks(self._unet)
        self._by_address = {layer.address: layer for layer in self.layers}
        numbered = self.family.layers if self.family else ()
        self._address_of = {layer.index: layer.address for layer in numbered}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._unet.parameters()).device

    def to(self, device: torch.device | str) -> TrainableModel:
        """Move the copy."""
        self._unet.to(device)
        return self

    def predict(
        self,
        noised: Tensor,
        timesteps: Tensor,
        text: Tensor,
        keys_values: KeysValues,
        *,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
        weight: float = 1.0,
        record: Record | None = None,
    ) -> Tensor:
        """One forward pass; see `train.objective.Base.predict`.

        Args:
            noised: ``[B, 4, h, w]``, x_t as the UNet reads it.
            timesteps: ``[B]``.
            text: ``[B, 77, D]`` or longer.
            keys_values: ``[B, T, C]`` of the image by the layer's number; empty for none.
            pooled: ``[B, P]`` for SDXL.
            size: ``[B, 6]`` for SDXL; the latent's own size without a crop unless given.
            weight: The paper's lambda; 1 in training.
            record: Gets what the branches of each layer gave.

        Returns:
            ``[B, 4, h, w]`` in float32: what the UNet predicts, noise or v.

        Raises:
            IncompatibleModelError: The model needs pooled text and got none.
        """
        options: dict[str, Any] = {
            "patches_replace": {"attn2": self._slots(keys_values, len(noised), weight, record)},
            # The host's fastest back end may be without a backward pass.
            "optimized_attention_override": _plain_attention,
        }
        more = {}
        if getattr(self._unet, "num_classes", None) is not None:
            more["y"] = self._vector(noised, pooled, size)
        device = self.device
        out = self._unet(
            usable(noised).to(device, self.dtype),
            timesteps.to(device).float(),
            context=usable(text).to(device, self.dtype),
            transformer_options=options,
            **more,
        )
        return cast(Tensor, out.float())

    def _slots(
        self, keys_values: KeysValues, rows: int, weight: float, record: Record | None
    ) -> dict[Address, Slot]:
        chunks = (Chunk(True, None, tuple(range(rows))),)
        slots = {}
        for index, (key, value) in keys_values.items():
            layer = self._by_address[self._address_of[index]]
            tokens = key.shape[1]
            keys, values = (attention.split_heads(x, layer.heads) for x in (key, value))
            keys, values = attention.scale(keys, values, weight, "V only", tokens)
            branch = Branch(keys, values, tokens, chunks)
            seen = branch if record is None else _Recorded(branch, index, record)
            slots[layer.address] = Slot((cast(Branch, seen),))
        return slots

    def _vector(self, noised: Tensor, pooled: Tensor | None, size: Tensor | None) -> Tensor:
        """The host's vector condition of SDXL, row by row."""
        if pooled is None:
            raise IncompatibleModelError(
                "The model reads pooled text (SDXL), and the batch has none. Encode the captions "
                "with the model's own CLIP, and keep 'pooled'."
            )
        height, width = (side * _LATENT for side in noised.shape[-2:])
        if size is None:
            size = torch.tensor([[height, width, 0, 0, height, width]] * len(noised))
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        rows = [
            self._model.encode_adm(
                pooled_output=usable(pooled[i : i + 1]).float(),
                device=self.device,
                **dict(zip(names, size[i].tolist(), strict=True)),
            )
            for i in range(len(noised))
        ]
        return torch.cat([usable(row).to(self.device, self.dtype) for row in rows])


class _Recorded:
    """A branch that reports what it adds."""

    def __init__(self, branch: Branch, index: int, record: Record) -> None:
        self._branch = branch
        self._index = index
        self._record = record

    def add(self, text: Tensor, query: Tensor, options: dict[str, Any]) -> Tensor:
        """See `Branch.add`."""
        image = self._branch.add(torch.zeros_like(text), query, options)
        self._record(self._index, text.detach(), image.detach())
        return text + image


def schedule_of(model: Any) -> Schedule:
    """Read the forward diffusion off a MODEL's sampling object.

    Raises:
        IncompatibleModelError: It is none of the discrete ones with a noise or v prediction.
    """
    sampling = model.get_model_object("model_sampling")
    known = comfy.model_sampling
    target: Target | None = None
    if isinstance(sampling, known.ModelSamplingDiscrete):
        # V_PREDICTION and the denoiser X0 are subclasses of EPS in the host.
        if isinstance(sampling, known.V_PREDICTION) and not isinstance(sampling, known.EDM):
            target = "v"
        elif isinstance(sampling, known.EPS) and not isinstance(
            sampling, (known.X0, known.V_PREDICTION)
        ):
            target = "epsilon"
    if target is None:
        names = ", ".join(base.__name__ for base in type(sampling).__mro__[1:3])
        raise IncompatibleModelError(
            f"The model's diffusion is {names}; training needs the discrete one of Stable "
            "Diffusion with a noise or v prediction. Take the checkpoint without sampling nodes."
        )
    sigmas = usable(sampling.sigmas).detach().cpu().double()
    return Schedule((1 / (1 + sigmas**2)).float(), target)


def _diffusion_model(model: Any) -> Any:
    found = model.get_model_object("diffusion_model")
    return getattr(found, "_orig_mod", found)  # torch.compile's shell


def _transformer(diffusion: Any, address: Address) -> Any:
    block, number, depth = address
    blocks = diffusion.middle_block if block == "middle" else getattr(diffusion, f"{block}_blocks")
    layers = blocks if block == "middle" else blocks[number]
    return next(
        layer.transformer_blocks[depth] for layer in layers if hasattr(layer, "transformer_blocks")
    )


def _copy(model: Any, dtype: torch.dtype) -> nn.Module:
    """The UNet with its weight patches, frozen, of one precision, outside of inference mode."""
    with torch.inference_mode(False):
        if getattr(model, "is_dynamic", lambda: False)():
            model = model.clone(disable_dynamic=True)
        if model.patches:
            comfy.model_management.load_models_gpu([model], force_full_load=True)
        source = _diffusion_model(model)
        for name, parameter in source.named_parameters():
            if type(parameter.data) is not Tensor:
                raise IncompatibleModelError(
                    f"The model is quantised ({name} is a {type(parameter.data).__name__}), and "
                    "gradients cannot pass. Load a checkpoint in fp16, bf16 or fp32."
                )
        copied = cast(nn.Module, copy.deepcopy(source))
        for module in copied.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    plain = usable(weight.detach()).to(dtype)
                    module._parameters[name] = nn.Parameter(plain, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = usable(buffer)
        setattr(copied, "dtype", dtype)  # noqa: B010 - what the host casts its embeddings to
        return copied.eval().requires_grad_(False)


def _plain_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own attention, whichever back end the host chose: it has a backward pass."""
    return cast(Tensor, host_attention.attention_pytorch(*args, **kwargs))


def _checkpoint_blocks(diffusion: nn.Module) -> None:
    """Have a private UNet compute its blocks again in the backward pass."""
    for module in diffusion.modules():
        if type(module).__name__ in ("BasicTransformerBlock", "ResBlock"):
            module.forward = _again(module.forward)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # The host writes into its options where it is; the second pass must read the same place.
        kept = {
            name: dict(value) if name == "transformer_options" else value
            for name, value in kwargs.items()
        }
        return checkpoint(partial(forward, **kept), *args, use_reentrant=False)

    return run
