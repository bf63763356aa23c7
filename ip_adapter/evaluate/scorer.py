"""Pictures and captions -> embeddings, by a named model whose weights are identified by content.

CLIP comes from open_clip with its own preprocessing, DINO from timm. Both run in float32, whatever
precision the pictures were made in, so that figures of different machines can be compared.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import CheckpointError, MissingFileError

BATCH = 16
"""Pictures or captions per run of a tower."""

CLIP = ("ViT-L-14", "openai")
"""The paper's: "CLIP ViT-L/14"."""

DINO = "vit_small_patch16_224.dino"
"""What DINO-I has meant since DreamBooth (arXiv 2208.12242): ViT-S/16 of the first DINO."""


@dataclass(frozen=True)
class ScorerCard:
    """Says exactly which model scored.

    Attributes:
        name: Its name in open_clip or timm.
        weights: The pretrained tag or the name of the file.
        sha256: Over names, shapes and float32 values of all parameters, sorted by name: the same
            for any container and precision that the same weights are stored in.
        activation: ``quick gelu`` or ``gelu``; tensors do not tell it.
        config: Its architecture, as JSON.
        preprocessing: From picture to input.
    """

    name: str
    weights: str
    sha256: str
    activation: str
    config: str
    preprocessing: str


class Scorer:
    """Embeds pictures and, if it has a text half, captions."""

    def __init__(
        self,
        card: ScorerCard,
        prepare: Callable[[Image.Image], Tensor],
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Sequence[str]], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.card = card
        self._prepare = prepare
        self._encode_image = encode_image
        self._encode_text = encode_text
        self._device = device

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """``[N, E]`` float32 on the CPU, not normalised, of RGB pictures of any size."""
        parts = []
        for start in range(0, len(pictures), BATCH):
            inputs = torch.stack([self._prepare(p) for p in pictures[start : start + BATCH]])
            parts.append(self._encode_image(inputs.to(self._device)).float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """``[N, E]`` float32 on the CPU, not normalised; a caption is cut after 77 tokens.

        Raises:
            TypeError: The model has no text half.
        """
        if self._encode_text is None:
            raise TypeError(f"{self.card.name} embeds pictures only")
        parts = []
        for start in range(0, len(captions), BATCH):
            parts.append(self._encode_text(captions[start : start + BATCH]).float().cpu())
        return torch.cat(parts)


def load_clip(name: str = CLIP[0], weights: str = CLIP[1], device: str = "cpu") -> Scorer:
    """Load a CLIP of open_clip.

    A pretrained tag brings its activation along: OpenAI's weights run with quick GELU, also under
    the plain name. A file cannot say it; choose ``ViT-L-14-quickgelu`` for OpenAI's weights.

    Args:
        name: Of a model that open_clip knows, or ``local-dir:FOLDER`` with
            ``open_clip_config.json`` and the weights beside it.
        weights: A pretrained tag, downloaded by open_clip on first use, or a file. Not used with
            a folder.
        device: Where it runs.

    Raises:
        CheckpointError: The weights do not fit the model.
        MissingFileError: There is no such model, tag or file, or it cannot be downloaded.
    """
    import open_clip

    is_folder = name.startswith("local-dir:")
    tag: dict[str, Any] = {} if is_folder else _check_clip(name, weights)
    quick = bool(tag.get("quick_gelu"))
    try:
        model = open_clip.create_model(
            name,
            pretrained=None if is_folder else weights,
            precision="fp32",
            force_quick_gelu=quick,
            require_pretrained=True,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "state_dict" in reason:
            raise CheckpointError(
                f"The weights '{weights}' do not fit the scorer {name}: {error}. Name the model "
                "that they were trained as."
            ) from error
        raise MissingFileError(
            f"The scorer {name} with the weights '{weights}' is not to be had ({reason}). Check "
            "the network, or give --scorer-weights a file that you already have."
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    prepared = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    config = _config(name) | ({"quick_gelu": True} if quick else {})
    card = ScorerCard(
        name=name if not is_folder else f"local-dir:{Path(name.removeprefix('local-dir:')).name}",
        weights="" if is_folder else (weights if tag else Path(weights).name),
        sha256=digest_of(model),
        activation=_activation(model),
        config=json.dumps(config, sort_keys=True),
        preprocessing="open_clip: " + json.dumps(vars(prepared), sort_keys=True, default=str),
    )

    def encode_text(captions: Sequence[str]) -> Tensor:
        return cast(Tensor, model.encode_text(tokenizer(list(captions)).to(device)))

    prepare = open_clip.transform.image_transform_v2(prepared, is_train=False)
    return Scorer(card, prepare, model.encode_image, encode_text, device)


def load_dino(name: str = DINO, weights: str | None = None, device: str = "cpu") -> Scorer:
    """Load an image tower of timm; its pooled output is the embedding, the class token for DINO.

    Args:
        name: Of a model that timm knows.
        weights: A file, or None to have timm download its own.
        device: Where it runs.

    Raises:
        CheckpointError: The weights do not fit the model.
        MissingFileError: There is no such model or file, or it cannot be downloaded.
    """
    timm: Any = importlib.import_module("timm")  # its exports are not declared
    if not timm.is_model(name):
        raise MissingFileError(f"timm knows no model {name!r}. {_near(name, timm.list_models())}")
    if weights is not None and not Path(weights).is_file():
        raise MissingFileError(f"There is no file {weights}. Give the weights of {name}, or none.")
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=weights is None,
            num_classes=0,
            checkpoint_path=weights or "",
        )
    except OSError as error:
        raise MissingFileError(
            f"The weights of {name} cannot be downloaded ({str(error).splitlines()[0]}). Check the "
            "network, or give --dino-weights a file that you already have."
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights of {name} cannot be used: {error}. Name the model that they were "
            "trained as, without its classifier."
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    prepared = timm.data.resolve_model_data_config(model)
    card = ScorerCard(
        name=name,
        weights="pretrained" if weights is None else Path(weights).name,
        sha256=digest_of(model),
        activation=_activation(model),
        config="",
        preprocessing="timm: " + json.dumps(prepared, sort_keys=True, default=str),
    )
    prepare = timm.data.create_transform(**prepared, is_training=False)
    return Scorer(card, prepare, model, None, device)


def digest_of(model: nn.Module) -> str:
    """SHA-256 of a model's parameters; see `ScorerCard`."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_clip(name: str, weights: str) -> dict[str, Any]:
    """open_clip's entry of a pretrained tag, or nothing for a file; refuse what is neither."""
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        raise MissingFileError(f"open_clip knows no model {name!r}. {_near(name, known)}")
    tag: dict[str, Any] = open_clip.pretrained.get_pretrained_cfg(name, weights)
    if not tag and not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise MissingFileError(
            f"'{weights}' is neither a file nor a pretrained tag of {name} (its tags: {tags})."
        )
    return tag


def _config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))["model_cfg"])
    return dict(open_clip.get_model_config(name))


def _activation(model: nn.Module) -> str:
    kinds = {type(part).__name__ for part in model.modules()}
    return "quick gelu" if kinds & {"QuickGELU", "QuickGELUActivation"} else "gelu"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"Near it: {', '.join(near)}." if near else "See its documentation for the names."
