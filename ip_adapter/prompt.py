"""Image prompts: the tokens that stand for one or several reference images.

A prompt belongs to the projection that made its tokens. It carries that projection's fingerprint,
so a saved prompt can be checked against the adapter it is used with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError, IncompatibleModelError
from .files import replacing

FORMAT = "ip_adapter.image_prompt"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """What the image branch attends to.

    Attributes:
        conditional: ``[F, T, D]``, the tokens of the reference images. F is 1, or there is a row
            for each picture of the batch; the last one serves those that come after it.
        unconditional: ``[1 or F, T, D]``, the tokens of "no image": the projection of the zero
            image embedding, as classifier-free guidance saw it in training (eq. 7).
        adapter: Fingerprint of the projection that made them.
        label: The adapter in words, for messages.
    """

    conditional: Tensor
    unconditional: Tensor
    adapter: str
    label: str

    @property
    def frames(self) -> int:
        """The number F of pictures of a batch that have an image prompt of their own."""
        return self.conditional.shape[0]

    @property
    def tokens(self) -> int:
        """The number T of image tokens."""
        return self.conditional.shape[1]

    def __deepcopy__(self, memo: object) -> ImagePrompt:
        return self


def from_tokens(
    conditional: Tensor, unconditional: Tensor, adapter: str, label: str, frames: int = 1
) -> ImagePrompt:
    """Make one prompt of the tokens of N references, and of M for the unconditional side.

    The references' tokens stand side by side, so that one softmax runs over all of them. Where the
    sides differ in number both are repeated to match; repeating every token of a set does not
    change what attention over it returns.

    Args:
        conditional: ``[N, T, D]``, equally many for each frame and in the order of frames.
        unconditional: ``[M, T, D]``; all M for every frame, unless M is a multiple of `frames`.
        adapter: Fingerprint of the projection.
        label: The adapter in words.
        frames: The number F of pictures of a batch that have references of their own.
    """
    given = conditional.view(frames, -1, *conditional.shape[1:])  # [F, N/F, T, D]
    groups = 1 if len(unconditional) % frames else frames
    without = unconditional.view(groups, -1, *unconditional.shape[1:])
    count = math.lcm(given.shape[1], without.shape[1])
    return ImagePrompt(
        conditional=_side_by_side(given, count),
        unconditional=_side_by_side(without, count),
        adapter=adapter,
        label=label,
    )


def _side_by_side(tokens: Tensor, count: int) -> Tensor:
    """``[F, N, T, D]`` -> ``[F, count*T, D]``, where `count` is a multiple of N."""
    return tokens.repeat(1, count // tokens.shape[1], 1, 1).flatten(1, 2)


def join(prompts: Sequence[ImagePrompt]) -> ImagePrompt:
    """Put the tokens of several prompts side by side, as if encoded together.

    Raises:
        IncompatibleModelError: The prompts come from different adapters.
    """
    first = prompts[0]
    for other in prompts[1:]:
        if other.adapter != first.adapter:
            raise IncompatibleModelError(
                f"Image prompts of two adapters cannot be joined: {first.label} and {other.label}. "
                "Encode both with the same adapter, or apply each with its own adapter in a chain."
            )
    counts = {p.frames for p in prompts} - {1}
    if len(counts) > 1:
        raise IncompatibleModelError(
            f"Image prompts with a reference for each of {' and of '.join(map(str, counts))} "
            "pictures cannot be joined. Give both as many references, or one a single one."
        )
    return ImagePrompt(
        conditional=_together([p.conditional for p in prompts]),
        unconditional=_together([p.unconditional for p in prompts]),
        adapter=first.adapter,
        label=first.label,
    )


def _together(many: Sequence[Tensor]) -> Tensor:
    frames = max(len(tokens) for tokens in many)
    return torch.cat([tokens.expand(frames, -1, -1) for tokens in many], dim=1)


def save(prompt: ImagePrompt, path: Path) -> None:
    """Write a prompt as .safetensors; `load` returns the same numbers."""
    tensors = {
        "conditional": prompt.conditional.contiguous().cpu(),
        "unconditional": prompt.unconditional.contiguous().cpu(),
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "adapter": prompt.adapter,
        "label": prompt.label,
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def load(path: Path) -> ImagePrompt:
    """Read a prompt that `save` wrote.

    Raises:
        CheckpointError: The file is not a saved image prompt, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path.name}' cannot be read as an image prompt: {error}. Needed is a .safetensors "
            "file written by Save Image Prompt; the file may be incomplete, save it again."
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"'{path.name}' is not a saved image prompt: its format is "
            f"{metadata.get('format', 'unnamed')!r} version {metadata.get('version', 'none')!r}, "
            f"needed is {FORMAT!r} version {VERSION!r}. Choose a file written by Save Image Prompt."
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    shape, other = shapes.get("conditional", ()), shapes.get("unconditional", ())
    if len(shape) != 3 or other[1:] != shape[1:] or other[0] not in (1, shape[0]):
        raise CheckpointError(
            f"'{path.name}' holds {shapes}; needed are 'conditional' and 'unconditional' of the "
            "same shape [frames, tokens, width]. Save the image prompt again."
        )
    return ImagePrompt(
        tensors["conditional"],
        tensors["unconditional"],
        metadata.get("adapter", ""),
        metadata.get("label", "unknown"),
    )
