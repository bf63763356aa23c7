"""From tensor names and shapes to an adapter's spec; file names never matter.

Also says what a file is that is *not* a supported adapter, because "wrong file in this folder" is
the most frequent mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import CheckpointError, IncompatibleModelError
from .layers import FAMILIES, family_name, find_family
from .projections import HEAD_WIDTH
from .spec import AdapterSpec, LinearProjection, Projection, ResamplerProjection

Shapes = Mapping[str, tuple[int, ...]]

_KEY_VALUE = re.compile(r"ip_adapter\.(\d+)\.to_[kv]_ip\.weight")

_OTHER_FILES: tuple[tuple[str, str], ...] = (
    (r"^double_blocks\.\d+\.processor\.ip_adapter", "an IP-Adapter for FLUX (XLabs)"),
    (r"lora_(unet|te|down|up|A|B)|\.lora\.", "a LoRA; it belongs into models/loras"),
    (
        r"^(control_model\.|controlnet_|zero_convs\.|input_hint_block\.)",
        "a ControlNet; it belongs into models/controlnet",
    ),
    (
        r"^(model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.)",
        "a whole checkpoint; it belongs into models/checkpoints",
    ),
    (
        r"^(input_blocks\.|down_blocks\.|double_blocks\.|transformer_blocks\.)",
        "a diffusion model; it belongs into models/diffusion_models",
    ),
    (
        r"^(vision_model\.|visual\.)",
        "a CLIP image encoder; it belongs into models/clip_vision",
    ),
    (r"^text_model\.", "a text encoder; it belongs into models/text_encoders"),
    (r"^(encoder|decoder)\.(conv_in|down|mid|up)", "a VAE; it belongs into models/vae"),
)

_OTHER_ADAPTERS: tuple[tuple[str, str], ...] = (
    (r"^image_proj\.(body|mapping)", "a PuLID file, which is another method"),
    (r"^image_proj\.proj_new_input\.", "an IP-Adapter Instruct"),
    (r"^image_proj\.perceiver_resampler\.", "an IP-Adapter FaceID-Plus"),
    (r"^image_proj\.proj\.3\.weight", "an IP-Adapter full-face"),
    (r"^image_proj\.proj\.0\.weight", "an IP-Adapter FaceID or portrait"),
    (r"^ip_adapter\.0\.(norm_ip|to_k_ip|add_k_proj_ip)", "an IP-Adapter for a transformer model"),
)

_SUPPORTED = "IP-Adapter (global) and IP-Adapter Plus for " + ", ".join(f.name for f in FAMILIES)
_WHERE = (
    "Published files: ip-adapter_sd15.safetensors and ip-adapter-plus_sd15.safetensors at "
    "https://huggingface.co/h94/IP-Adapter/tree/main/models"
)


def identify(shapes: Shapes, name: str) -> AdapterSpec:
    """Say which adapter a set of tensors is.

    Args:
        shapes: Shape of every tensor under its flat key, ``image_proj.*`` and ``ip_adapter.*``.
        name: What to call the file in messages.

    Raises:
        CheckpointError: It is no adapter, an unsupported one, or tensors are missing or misshapen.
        IncompatibleModelError: It is an adapter for a base model family that is not supported.
    """
    has_projection = any(key.startswith("image_proj.") for key in shapes)
    has_layers = any(key.startswith("ip_adapter.") for key in shapes)
    if not (has_projection and has_layers):
        raise CheckpointError(
            f"'{name}' is not an IP-Adapter: it is {_other_file(shapes)}. Needed are tensors "
            f"'image_proj.*' and 'ip_adapter.*'. {_WHERE}"
        )
    for pattern, what in _OTHER_ADAPTERS:
        if any(re.search(pattern, key) for key in shapes):
            raise CheckpointError(
                f"'{name}' is {what}, which this version does not support; supported are "
                f"{_SUPPORTED}. {_WHERE}"
            )
    return _spec(shapes, name)


def _spec(shapes: Shapes, name: str) -> AdapterSpec:
    layers = sorted({int(m[1]) for key in shapes if (m := _KEY_VALUE.fullmatch(key))})
    if not layers:
        raise CheckpointError(
            f"'{name}' has an image projection but no keys and values (ip_adapter.1.to_k_ip.weight "
            "and so on). Training scripts of old lose them; convert the dump again."
        )
    context_width = _shape(shapes, f"ip_adapter.{layers[0]}.to_k_ip.weight", 2, name)[1]
    family = find_family(context_width, len(layers))
    if family is None:
        raise IncompatibleModelError(
            f"'{name}' is an IP-Adapter for {family_name(context_width, len(layers))}; supported "
            f"are {_SUPPORTED}. {_WHERE}"
        )
    expected = [layer.index for layer in family.layers]
    if layers != expected:
        raise CheckpointError(
            f"'{name}' numbers its layers {layers}; {family.name} adapters have {expected}."
        )
    widths = tuple(
        _shape(shapes, f"ip_adapter.{index}.to_k_ip.weight", 2, name)[0] for index in expected
    )
    return AdapterSpec(family, _projection(shapes, family.context_width, name), widths)


def _projection(shapes: Shapes, width: int, name: str) -> Projection:
    if "image_proj.latents" in shapes:
        _, tokens, inner = _shape(shapes, "image_proj.latents", 3, name)
        depth = {m[1] for key in shapes if (m := re.match(r"image_proj\.layers\.(\d+)\.", key))}
        first = "image_proj.layers.0."
        return ResamplerProjection(
            features=_shape(shapes, "image_proj.proj_in.weight", 2, name)[1],
            tokens=tokens,
            inner=inner,
            heads=_shape(shapes, first + "0.to_q.weight", 2, name)[0] // HEAD_WIDTH,
            depth=len(depth),
            hidden=_shape(shapes, first + "1.1.weight", 2, name)[0],
            width=width,
        )
    if "image_proj.proj.weight" in shapes:
        rows, features = _shape(shapes, "image_proj.proj.weight", 2, name)
        if rows % width:
            raise CheckpointError(
                f"'{name}': image_proj.proj.weight has {rows} rows, which is not a whole number of "
                f"tokens of width {width}. The file mixes parts of two adapters; download it again."
            )
        return LinearProjection(features=features, tokens=rows // width, width=width)
    found = sorted(key for key in shapes if key.startswith("image_proj."))[:6]
    raise CheckpointError(
        f"'{name}' has an image projection that is not known here (tensors {found} ...); supported "
        f"are {_SUPPORTED}. {_WHERE}"
    )


def check_tensors(found: Shapes, needed: Shapes, name: str) -> None:
    """Compare a file's tensors with those its spec calls for.

    Raises:
        CheckpointError: Tensors are missing or have another shape; names the first few.
    """
    missing = [key for key in needed if key not in found]
    if missing:
        raise CheckpointError(
            f"'{name}' lacks {len(missing)} of {len(needed)} tensors: {_some(missing)}. The file "
            "is incomplete; download or convert it again."
        )
    wrong = [
        f"{key} is {list(found[key])}, needed {list(needed[key])}"
        for key in needed
        if found[key] != needed[key]
    ]
    if wrong:
        raise CheckpointError(
            f"'{name}' has {len(wrong)} tensors of the wrong shape: {_some(wrong)}. The file mixes "
            "parts of two adapters; download or convert it again."
        )


def _shape(shapes: Shapes, key: str, rank: int, name: str) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or len(shape) != rank:
        found = "no such tensor" if shape is None else f"shape {list(shape)}"
        raise CheckpointError(
            f"'{name}': tensor {key} with {rank} dimensions is needed, found {found}. The file is "
            "incomplete; download or convert it again."
        )
    return shape


def _other_file(shapes: Shapes) -> str:
    for pattern, what in _OTHER_FILES:
        if any(re.search(pattern, key) for key in shapes):
            return what
    if not shapes:
        return "a file without tensors"
    return f"something with tensors such as {_some(sorted(shapes))}"


def _some(items: list[str], count: int = 3) -> str:
    more = "" if len(items) <= count else f" and {len(items) - count} more"
    return ", ".join(items[:count]) + more
