from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ip_adapter import prompt
from ip_adapter.errors import CheckpointError, IncompatibleModelError


def make(
    count: int = 1, adapter: str = "abc", seed: int = 0, frames: int = 1
) -> prompt.ImagePrompt:
    generator = torch.Generator().manual_seed(seed)
    return prompt.from_tokens(
        torch.randn(count, 4, 8, generator=generator),
        torch.randn(1, 4, 8, generator=generator),
        adapter,
        f"adapter {adapter}",
        frames,
    )


def test_references_stand_side_by_side() -> None:
    tokens, none = torch.randn(3, 4, 8), torch.randn(1, 4, 8)
    made = prompt.from_tokens(tokens, none, "abc", "label")
    assert made.tokens == 12
    for i in range(3):
        assert torch.equal(made.conditional[0, 4 * i : 4 * i + 4], tokens[i])
        assert torch.equal(made.unconditional[0, 4 * i : 4 * i + 4], none[0])


def test_join_is_encoding_together() -> None:
    tokens, none = torch.randn(3, 4, 8), torch.randn(1, 4, 8)
    whole = prompt.from_tokens(tokens, none, "abc", "label")
    parts = [prompt.from_tokens(part, none, "abc", "label") for part in tokens.split((1, 2))]
    joined = prompt.join(parts)
    assert torch.equal(joined.conditional, whole.conditional)
    assert torch.equal(joined.unconditional, whole.unconditional)


def test_prompts_of_two_adapters_are_not_joined() -> None:
    with pytest.raises(IncompatibleModelError, match="adapter abc and adapter xyz"):
        prompt.join([make(), make(adapter="xyz")])


def test_save_and_load_is_identity(tmp_path: Path) -> None:
    saved = make(count=2)
    prompt.save(saved, tmp_path / "a.safetensors")
    loaded = prompt.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.conditional, saved.conditional)
    assert torch.equal(loaded.unconditional, saved.unconditional)
    assert (loaded.adapter, loaded.label) == (saved.adapter, saved.label)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a saved image prompt"):
        prompt.load(path)
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="cannot be read"):
        prompt.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    prompt.save(make(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="save it again"):
        prompt.load(path)


def test_misshapen_tokens_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": prompt.FORMAT, "version": prompt.VERSION}
    save_file(
        {"conditional": torch.zeros(1, 4, 8), "unconditional": torch.zeros(1, 5, 8)},
        path,
        metadata=metadata,
    )
    with pytest.raises(CheckpointError, match="same shape"):
        prompt.load(path)


def test_a_deep_copy_shares_the_tokens() -> None:
    """Hosts before 2026 deep-copy a model's options with every clone."""
    made = make()
    assert copy.deepcopy(made) is made


def test_frames_get_their_own_references() -> None:
    """Six sets of tokens, two for each of three frames."""
    tokens, none = torch.randn(6, 4, 8), torch.randn(1, 4, 8)
    made = prompt.from_tokens(tokens, none, "abc", "label", frames=3)
    assert (made.frames, made.tokens) == (3, 8)
    for frame in range(3):
        own = tokens[2 * frame : 2 * frame + 2].flatten(0, 1)
        assert torch.equal(made.conditional[frame], own)
    assert torch.equal(made.unconditional, torch.cat([none, none], dim=1))


def test_frames_are_saved_and_joined(tmp_path: Path) -> None:
    made = make(3, frames=3)
    prompt.save(made, tmp_path / "p.safetensors")
    again = prompt.load(tmp_path / "p.safetensors")
    assert torch.equal(again.conditional, made.conditional)
    assert torch.equal(again.unconditional, made.unconditional)
    both = prompt.join([made, make(1, seed=1)])
    assert (both.frames, both.tokens) == (3, 8)
    assert torch.equal(both.conditional[2, 4:], make(1, seed=1).conditional[0])
    with pytest.raises(IncompatibleModelError, match=r"3 and of 2|2 and of 3"):
        prompt.join([made, make(2, frames=2)])
