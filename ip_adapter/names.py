"""Names of an adapter's tensors: training dumps and diffusers' names -> the published flat ones.

Renames only; it reads no file and does not say which adapter the tensors are (`detection` does).
What it knows, besides the published names:

    image_proj_model.*, adapter_modules.{n}.*     the module that the paper's training scripts train
    {block}.attn2.processor.to_k_ip.weight        the same layers under their place in the UNet,
                                                  where a safetensors dump keeps its shared tensors
    {block}.attn2.processor.to_k_ip.0.weight      a diffusers UNet with adapters loaded
    encoder_hid_proj.image_projection_layers.0.*  its image projection
    adapter_modules.{n}.*                         Kolors FaceID

with or without a leading ``unet.`` and the wrappers ``module.``, ``model.``, ``state_dict.`` and
``_orig_mod.`` of distributed training, Lightning and ``torch.compile``.

Source: diffusers ``loaders/unet.py`` (the conversion inverted here) and ``models/embeddings.py`` of
0.26 and 0.42, tencent-ailab/IP-Adapter ``tutorial_train*.py``, accelerate ``utils/other.py``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, IncompatibleModelError, MissingFileError
from .layers import FAMILIES, PUBLIC
from .refusals import some

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_WRAPPER = re.compile(
    r"^(?:(?:module|model|state_dict|_orig_mod)\.)+|(?<=\.)(?:module|_orig_mod)\."
)
_OURS = re.compile(r"image_proj|ip_adapter|adapter_modules|to_[kv]_ip|_lora")

_DIFFUSERS_PROJECTION = re.compile(
    # Kolors' and Kandinsky's own encoder_hid_proj is one Linear, whose keys end right there.
    r"(?:unet\.)?encoder_hid_proj\.(?!weight$|bias$)"
    r"(?:image_projection_layers\.(?P<adapter>\d+)\.)?(?P<rest>.+)"
)
_ATTENTION = (
    r"(?:unet\.)?(?P<block>(?:down_blocks|mid_block|up_blocks)\.[\w.]*?transformer_blocks\.\d+)"
    r"\.attn(?P<which>[12])\."
)
_PROCESSOR = re.compile(_ATTENTION + r"processor\.(?P<rest>.+)")
_PEFT = re.compile(
    _ATTENTION
    + r"to_(?P<target>q|k|v|out)(?:\.0)?\.lora_(?P<half>[AB])\.faceid_(?P<adapter>\d+)\.weight"
)
_NUMBERED = re.compile(r"(?P<rest>to_[kv]_ip)\.(?P<adapter>\d+)\.weight")

_RESAMPLER_NAMES = tuple(
    (re.compile(r"layers\.(\d+)\." + pattern), r"layers.\1." + published)
    for pattern, published in (
        # Named blocks are those of diffusers since 0.27 (adaln_*: SD 3.5), numbered ones older.
        (r"(?:ln0|0)\.(weight|bias)", r"0.norm1.\2"),
        (r"(?:ln1|1)\.(weight|bias)", r"0.norm2.\2"),
        (r"(?:attn|2)\.to_(q|k|v|kv)\.weight", r"0.to_\2.weight"),
        (r"(?:attn|2)\.to_out(?:\.0)?\.weight", r"0.to_out.weight"),
        (r"(?:(?:ff|3)\.0|adaln_norm)\.(weight|bias)", r"1.0.\2"),
        (r"(?:ff|3)(?:\.1)?\.net\.0\.proj\.weight", r"1.1.weight"),
        (r"(?:ff|3)(?:\.1)?\.net\.2\.weight", r"1.3.weight"),
        (r"adaln_proj\.(weight|bias)", r"2.1.\2"),
    )
)

_DUMPS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "ip_adapter.safetensors",
    "ip-adapter.safetensors",
    "ip_adapter.bin",
    "ip-adapter.bin",
    "pytorch_model/mp_rank_00_model_states.pt",
    "mp_rank_00_model_states.pt",
)
"""What a training run's folder may hold, best first; a dump precedes what was converted from it,
because the conversion is where adapters were lost."""


def canonical(tensors: Mapping[str, Tensor], name: str) -> Tensors:
    """Give an adapter's tensors their published names and leave out everything else.

    A frozen UNet, text encoder or optimiser in the same dump is left out. Within the adapter
    nothing is: a name that means nothing here is kept under ``image_proj.`` or
    ``ip_adapter.{n}.``. Tensors are passed on as they are; only the separate keys and values of
    diffusers' resamplers are joined, ``[64H, D]`` twice to ``[128H, D]``.

    diffusers keeps a FaceID adapter's LoRA only where PEFT is installed, as weights named
    ``lora_A.faceid_0``; those are taken. Without PEFT it drops the LoRA, and so does its dump.

    Args:
        tensors: Every tensor of a file, nested names joined with dots.
        name: What to call the file in messages.

    Returns:
        Tensors named ``image_proj.*`` and ``ip_adapter.*``, or all of `tensors` under the names
        they came with, where no adapter is recognised.

    Raises:
        CheckpointError: The dump holds several adapters, half of one, or two different tensors
            for one name.
        IncompatibleModelError: The adapter's layers are those of no known UNet.
    """
    bare = _unwrap(tensors, name)
    _refuse_several(bare, name)
    projection = _part(bare, "image_proj.") or _part(bare, "image_proj_model.")
    layers = _part(bare, "ip_adapter.")
    is_published = bool(layers)
    layers = layers or _part(bare, "adapter_modules.") or _from_processors(bare, name)
    if projection and not layers:
        raise _without_layers(bare, len(projection), name)
    if layers and not projection:
        projection = _diffusers_projection(bare)
        if not projection and not is_published:
            raise CheckpointError(
                f"'{name}' has an adapter's keys and values ({len(layers)} tensors) but no image "
                "projection (image_proj.*, image_proj_model.* or encoder_hid_proj.*). Save the "
                "whole training module or the whole UNet, not only its attention processors."
            )
    if not (projection and layers):
        return dict(tensors)
    found = {f"image_proj.{key}": tensor for key, tensor in _published(projection, name).items()}
    found |= {f"ip_adapter.{key}": tensor for key, tensor in layers.items()}
    if len(found) < len(bare):
        log.debug("'%s': %d adapter tensors of %d in the file", name, len(found), len(bare))
    return found


def dump_files(folder: Path) -> list[Path]:
    """Find the weights in the folder of a training checkpoint or of a saved diffusers UNet.

    Returns:
        One file, or all shards of one model in order.

    Raises:
        MissingFileError: There is no such folder.
        CheckpointError: It holds no weights that are known, or lacks some of the shards.
    """
    if not folder.is_dir():
        raise MissingFileError(
            f"There is no folder '{folder.name}'. Name the checkpoint folder that the training "
            "script wrote, such as checkpoint-20000."
        )
    for dump in _DUMPS:
        path = folder / dump
        if path.is_file():
            return _shards(path) if path.suffix == ".json" else [path]
    inside = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    raise CheckpointError(
        f"The folder '{folder.name}' holds no weights of an adapter: it has {some(inside, 8)}. "
        f"Needed is one of {', '.join(_DUMPS)}. Name the innermost checkpoint folder; sharded "
        "DeepSpeed (ZeRO 3) or FSDP states must be merged first with the tool of their library."
    )


def _without_layers(bare: Tensors, projection: int, name: str) -> CheckpointError:
    unknown = sorted(key for key in bare if "to_k_ip" in key)
    if unknown:
        return CheckpointError(
            f"'{name}' has an adapter's keys and values under unknown names, such as "
            f"{unknown[0]}. Known are ip_adapter.1.to_k_ip.weight and a UNet's "
            "'...transformer_blocks.0.attn2.processor.to_k_ip.weight'. Rename them, or use the "
            "file that the adapter was published in."
        )
    return CheckpointError(
        f"'{name}' has an image projection ({projection} tensors) but no keys and values (such as "
        "ip_adapter.1.to_k_ip.weight). This is a known accident of training: newer accelerate "
        "writes model.safetensors, keeps tensors that two modules share only under their names in "
        "the UNet, and the usual conversion then finds none. Load the dump itself "
        "(model.safetensors of the checkpoint folder), which is understood here; if it has no "
        "'...attn2.processor.to_k_ip.weight' either, save again with "
        "accelerator.save_state(folder, safe_serialization=False)."
    )


def _unwrap(tensors: Mapping[str, Tensor], name: str) -> Tensors:
    """Drop what training tools put before or between the names of modules."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        bare = _WRAPPER.sub("", key)
        if bare in out and _OURS.search(bare) and not _same(out[bare], tensor):
            raise CheckpointError(
                f"'{name}' holds two different tensors for {bare}, one of them as {key}. It mixes "
                "two adapters; save each to a file of its own."
            )
        out.setdefault(bare, tensor)
    return out


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _part(bare: Tensors, prefix: str) -> Tensors:
    return {key[len(prefix) :]: tensor for key, tensor in bare.items() if key.startswith(prefix)}


def _refuse_several(bare: Tensors, name: str) -> None:
    adapters: set[str] = set()
    for key in bare:
        layer = _PROCESSOR.fullmatch(key)
        match = (
            _NUMBERED.fullmatch(layer["rest"])
            if layer
            else _DIFFUSERS_PROJECTION.fullmatch(key) or _PEFT.fullmatch(key)
        )
        if match and match["adapter"] is not None:
            adapters.add(match["adapter"])
    if len(adapters) > 1:
        raise CheckpointError(
            f"'{name}' is a UNet with {len(adapters)} adapters in it (to_k_ip.0, to_k_ip.1 and so "
            "on); one is needed. Load the adapters' own files one by one, or save the UNet again "
            "with a single adapter loaded."
        )


def _from_processors(bare: Tensors, name: str) -> Tensors:
    """Number the layers that are named by their place in the UNet.

    The numbers are those of diffusers' attention processors, self-attention before its
    cross-attention (see `layers`).
    """
    placed: list[tuple[str, int, str, Tensor]] = []
    for key, tensor in bare.items():
        if match := _PROCESSOR.fullmatch(key):
            numbered = _NUMBERED.fullmatch(match["rest"])
            rest = f"{numbered['rest']}.weight" if numbered else match["rest"]
        elif match := _PEFT.fullmatch(key):
            half = "down" if match["half"] == "A" else "up"
            rest = f"to_{match['target']}_lora.{half}.weight"
        else:
            continue
        placed.append((match["block"], int(match["which"]), rest, tensor))
    blocks = {block for block, _, rest, _ in placed if rest.startswith(("to_k_ip", "to_v_ip"))}
    if not blocks:
        return {}
    first = _first_numbers(blocks | {block for block, *_ in placed}, name)
    return {f"{first[block] + which - 1}.{rest}": tensor for block, which, rest, tensor in placed}


def _first_numbers(blocks: set[str], name: str) -> dict[str, int]:
    """Map each transformer block to the number of its self-attention."""
    for family in FAMILIES:
        numbers = {layer.diffusers: layer.index - 1 for layer in family.layers}
        if numbers.keys() == blocks:
            return numbers
    counts = {family.name: len(family.layers) for family in PUBLIC}
    known = ", ".join(f"{family} {count}" for family, count in counts.items())
    raise IncompatibleModelError(
        f"'{name}' has an adapter in {len(blocks)} transformer blocks of a UNet ({min(blocks)} to "
        f"{max(blocks)}), which are not those of a known one; known are {known}. Adapters for "
        "pruned or changed UNets cannot be numbered; if layers are missing, save the dump again."
    )


def _diffusers_projection(bare: Tensors) -> Tensors:
    matches = ((_DIFFUSERS_PROJECTION.fullmatch(key), tensor) for key, tensor in bare.items())
    return {match["rest"]: tensor for match, tensor in matches if match}


def _published(parts: Tensors, name: str) -> Tensors:
    """Undo diffusers' renaming of an image projection; published names pass unchanged."""
    out: Tensors = {}
    split: dict[str, dict[str, Tensor]] = {}
    norm = "proj.3." if _is_per_patch(parts) else "norm."
    for key, tensor in parts.items():
        new = _resampler_name(key)
        if new == key:
            new = _network_name(key, norm)
        elif match := re.fullmatch(r"(.*\.to_)([kv])\.weight", new):
            split.setdefault(match[1], {})[match[2]] = tensor
            continue
        out[new] = tensor
    for stem, halves in split.items():
        if len(halves) < 2:
            raise CheckpointError(
                f"'{name}' lacks a half of image_proj.{stem}kv.weight: it has only "
                f"'to_{next(iter(halves))}'. The file is incomplete; save it again."
            )
        out[f"{stem}kv.weight"] = torch.cat([halves["k"], halves["v"]])
    if "proj.net.0.proj.weight" in parts:  # FaceID-Plus; diffusers flattens its resampler
        inner = ("proj_in.", "proj_out.", "norm_out.", "layers.")
        return {f"perceiver_resampler.{k}" if k.startswith(inner) else k: out[k] for k in out}
    return out


def _resampler_name(key: str) -> str:
    for pattern, published in _RESAMPLER_NAMES:
        if match := pattern.fullmatch(key):
            return match.expand(published)
    return key


def _network_name(key: str, norm: str) -> str:
    """Name the Linear layers of the other projections."""
    # diffusers' FeedForward: net.0.proj is the first Linear, net.1 dropout, net.2 the second.
    for pattern, published in (
        (r"^image_embeds\.", "proj."),
        (r"^(?:proj|ff)\.net\.0\.proj\.", "proj.0."),
        (r"^(?:proj|ff)\.net\.2\.", "proj.2."),
        (r"^norm\.", norm),
    ):
        key = re.sub(pattern, published, key)
    return key


def _is_per_patch(parts: Tensors) -> bool:
    """Whether this is the full-face projection, whose names in diffusers are FaceID's too.

    It keeps the width of the features inside and makes one token per patch; FaceID doubles the
    width and makes several tokens of one vector.
    """
    first, second, norm = (
        parts.get(key) for key in ("ff.net.0.proj.weight", "ff.net.2.weight", "norm.weight")
    )
    if first is None or second is None or norm is None:
        return False
    return first.shape[0] == first.shape[1] and second.shape[0] == norm.shape[0]


def _shards(index: Path) -> list[Path]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # Only names: an index must not lead out of its folder.
        shards = [index.parent / Path(file).name for file in files]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{index.name}' is not an index of shards: its 'weight_map' cannot be read "
            f"({type(error).__name__}: {error}). Copy it again from the training machine."
        ) from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise CheckpointError(
            f"'{index.name}' names {len(shards)} shards, of which {len(missing)} are not in its "
            f"folder: {some(missing, 8)}. Copy all of them there."
        )
    return shards
