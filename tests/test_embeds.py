from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ip_adapter import embeds
from ip_adapter.encoders import VIT_BIGG, VIT_H
from ip_adapter.errors import CheckpointError, ImageError, IncompatibleModelError
from ip_adapter.layers import SD15
from ip_adapter.spec import (
    AdapterSpec,
    FaceProjection,
    LinearProjection,
    Projection,
    ResamplerProjection,
)


def spec(projection: Projection, **fields: Any) -> AdapterSpec:
    return AdapterSpec(SD15, projection, (8,) * 16, variant=projection.layout, **fields)


POOLED = spec(LinearProjection(1024, 4, 768), encoder=VIT_H)
BIGG = spec(LinearProjection(1280, 4, 2048), encoder=VIT_BIGG)
HIDDEN = spec(ResamplerProjection(1280, 16, 768, 12, 4, 3072, 768), encoder=VIT_H)
FACE = spec(FaceProjection(512, 1024, 4, 768))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1024), (3, 1280), (2, 5, 64)])
def test_what_is_saved_is_loaded(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    given = draw(*shape).to(dtype)
    path = tmp_path / "a.ipadpt"
    embeds.save(given, path)
    for found in (embeds.load(path), torch.load(path, weights_only=True)):
        assert found.dtype == dtype
        assert torch.equal(found, given)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ipadpt"]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_old_pack_are_read(tmp_path: Path, zipped: bool) -> None:
    given = draw(2, 1024).requires_grad_()
    torch.save(given, tmp_path / "a.ipadpt", _use_new_zipfile_serialization=zipped)
    found = embeds.load(tmp_path / "a.ipadpt")
    assert torch.equal(found, given)
    assert not found.requires_grad


def test_a_view_is_saved_without_what_is_behind_it(tmp_path: Path) -> None:
    embeds.save(draw(100, 1024)[3:4], tmp_path / "a.ipadpt")
    assert (tmp_path / "a.ipadpt").stat().st_size < 2 * 4 * 1024
    assert torch.equal(embeds.load(tmp_path / "a.ipadpt"), draw(100, 1024)[3:4])


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ipadpt"
    embeds.save(draw(1, 8), path)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        embeds.save(draw(1, 8, seed=1), path)
    assert torch.equal(embeds.load(path), draw(1, 8))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle", "inside"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, container: str) -> None:
    path, marker = tmp_path / "evil.ipadpt", tmp_path / "was run"
    match container:
        case "zip":
            torch.save(Evil(marker), path)
        case "legacy":
            torch.save(Evil(marker), path, _use_new_zipfile_serialization=False)
        case "pickle":
            path.write_bytes(pickle.dumps(Evil(marker), protocol=2))
        case "inside":
            torch.save({"embeds": draw(1, 8), "more": Evil(marker)}, path)
    with pytest.raises(CheckpointError, match=r"'evil.ipadpt' is a pickle .* could run code"):
        embeds.load(path)
    assert not marker.exists()
    if container == "zip":  # the file is what it is said to be
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1)}, "holds a dict; needed is one tensor"),
        ([torch.ones(2, 1, 8)], "holds a list; needed is one tensor"),
        (torch.ones(1, 8, dtype=torch.int64), "holds torch.int64 numbers"),
        (torch.ones(0, 8), r"shape \(0, 8\)"),
        (torch.ones(2, 8).to_sparse(), "needed are features"),
    ],
)
def test_what_is_no_features_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.ipadpt")
    with pytest.raises(CheckpointError, match=message):
        embeds.load(tmp_path / "a.ipadpt")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ipadpt"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no file of embeds, or not all of it \(0 bytes\)"):
        embeds.load(path)
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="no file of embeds"):
        embeds.load(path)
    embeds.save(draw(1, 1024), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not all of it"):
        embeds.load(path)
    torch.save(draw(1, 1024), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(CheckpointError, match="damaged file of embeds"):
        embeds.load(path)


def test_no_tensor_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleModelError, match=r"are a builtins\.dict, which another pack"):
        embeds.save({}, tmp_path / "a.ipadpt")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "of"),
    [(draw(2, 1024), POOLED), (draw(1, 257, 1280), HIDDEN), (draw(2, 5, 1280), HIDDEN)],
)
def test_what_fits_passes_unchanged(given: Tensor, of: AdapterSpec) -> None:
    assert torch.equal(embeds.check(given, of), given)
    assert embeds.check(given.half(), of).dtype == torch.float32
    positive, negative = embeds.split(given, of)
    assert torch.equal(positive, given) and negative is None


def test_faces_come_as_rows_or_as_one_token_each() -> None:
    given = draw(2, 512)
    assert torch.equal(embeds.check(given, FACE), given)
    assert torch.equal(embeds.check(given[:, None], FACE), given)
    positive, negative = embeds.split(given[:, None], FACE)  # [2, 1, 512] is two faces
    assert torch.equal(positive, given) and negative is None


@pytest.mark.parametrize(
    ("shape", "of", "made_by", "needed"),
    [
        ((1, 1280), POOLED, "pooled features of OpenCLIP ViT-bigG/14", "pooled features of .*-H"),
        ((1, 257, 1280), POOLED, "hidden features of OpenCLIP ViT-H/14", r"\[pictures, 1024\]"),
        ((1, 257, 1280), BIGG, "hidden features of OpenCLIP ViT-H/14", r"\[pictures, 1280\]"),
        ((1, 1280), HIDDEN, "pooled .*bigG/14", r"\[pictures, patches, 1280\], hidden .* ViT-H"),
        ((1, 257, 1664), HIDDEN, "hidden features of OpenCLIP ViT-bigG/14", "plus for SD 1.5"),
        ((2, 768), POOLED, "CLIP ViT-L/14 or CLIP ViT-L/14-336", "global for SD 1.5"),
        ((1, 512), POOLED, "vectors of a face recogniser", "1024"),
        ((1, 1024), FACE, "pooled features of OpenCLIP ViT-H/14", r"\[faces, 512\], vectors of a"),
        ((3, 77), POOLED, "no output of an image encoder that is known", "1024"),
        ((0, 1024), POOLED, "pooled features of OpenCLIP ViT-H/14", "1024"),
        ((1024,), POOLED, "no output", "1024"),
        ((2, 577, 1024), POOLED, "hidden features of CLIP ViT-L/14-336", "pooled"),
    ],
)
def test_what_does_not_fit_is_named(
    shape: tuple[int, ...], of: AdapterSpec, made_by: str, needed: str
) -> None:
    for call in (embeds.check, embeds.split):
        with pytest.raises(IncompatibleModelError, match=made_by) as caught:
            call(torch.zeros(shape), of)
        assert str(list(shape)) in str(caught.value)
        with pytest.raises(IncompatibleModelError, match=needed):
            call(torch.zeros(shape), of)


def test_values_that_are_not_numbers_are_refused() -> None:
    given = draw(1, 1024)
    given[0, 5] = float("nan")
    with pytest.raises(ImageError, match="negative embeds have values that are not numbers"):
        embeds.check(given, POOLED, "negative embeds")


@pytest.mark.parametrize(("shape", "of"), [((3, 1024), POOLED), ((2, 257, 1280), HIDDEN)])
def test_a_stack_of_both_sides_is_parted(shape: tuple[int, ...], of: AdapterSpec) -> None:
    """As files of before March 2024: torch.stack of the picture's and the empty picture's."""
    cond, zeroed = draw(*shape), draw(*shape, seed=1)
    positive, negative = embeds.split(torch.stack((cond, zeroed)), of)
    assert torch.equal(positive, cond)
    assert negative is not None and torch.equal(negative, zeroed)
    with pytest.raises(IncompatibleModelError):
        embeds.split(torch.stack((cond, cond, zeroed)), of)
    with pytest.raises(IncompatibleModelError):
        embeds.check(torch.stack((cond, zeroed)), of)


def test_several_are_put_into_one_batch() -> None:
    first, second = draw(2, 8), draw(1, 8, seed=1)
    assert torch.equal(embeds.together([first, second]), torch.cat((first, second)))
    with pytest.raises(
        IncompatibleModelError, match=r"\[2, 8\], no output .*; \[1, 1024\], pooled"
    ):
        embeds.together([first, draw(1, 1024)])
    with pytest.raises(IncompatibleModelError, match="differ in kind or width"):
        embeds.together([first, draw(1, 257, 8)])
    with pytest.raises(IncompatibleModelError, match="NoneType"):
        embeds.together([first, None])  # type: ignore[list-item]
