"""Cached features against the host's own encoders, and what the cache survives."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.host.test_encoding import HIDDEN, POOLED, clip_vision
from tests.host.test_encoding import SIZE as SEEN
from tests.synthetic.models import CHECKPOINT
from tests.tolerance import assert_close

pytestmark = pytest.mark.host

SIZE = 32
"""Of the target in pixels."""

SHAPES = ((40, 50), (64, 32), (33, 97), (20, 20), (50, 40))
CAPTIONS = ("a cat", "", "a (red) \\(cat\\) (on:1.5) [it]", "long " * 100, "a cat")


@pytest.fixture
def cache(host: Any) -> Any:
    return host.library("ip_adapter.train.cache")


@pytest.fixture
def data(host: Any) -> Any:
    return host.library("ip_adapter.train.data")


@pytest.fixture(scope="module")
def base(host: Any, model_files: Path) -> tuple[Any, Any]:
    """The nano checkpoint's VAE, and the first two layers of its CLIP, for speed."""
    import comfy.sd

    with torch.inference_mode():
        _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(model_files / CHECKPOINT))
    encoder = clip.cond_stage_model.clip_l.transformer.text_model.encoder
    encoder.layers = encoder.layers[:2]
    return vae, clip


@pytest.fixture
def vision(host: Any) -> Any:
    return clip_vision()


@pytest.fixture
def encoders(cache: Any, base: tuple[Any, Any], vision: Any) -> Any:
    return cache.Encoders(*base, vision)


@pytest.fixture
def rows(data: Any, tmp_path: Path) -> tuple[Any, ...]:
    """Five pictures with captions; the second has another reference, all have a face."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number, (shape, text) in enumerate(zip(SHAPES, CAPTIONS, strict=True)):
        draw(folder / f"{number}.png", number, shape)
        np.save(folder / f"{number}.npy", vector(number).numpy())
        lines.append({"image": f"{number}.png", "text": text, "face": f"{number}.npy"})
    draw(folder / "other.png", 77, (30, 70))
    lines[1]["reference"] = "other.png"
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return data.check(data.read(folder / "rows.jsonl"))  # type: ignore[no-any-return]


def draw(path: Path, seed: int, shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(picture).save(path)


def vector(seed: int) -> Tensor:
    return 3 * torch.randn(512, generator=torch.Generator().manual_seed(seed))


def shown(row: Any, reference: bool = False) -> Tensor:
    piece = row.reference if reference and row.reference else row.image
    return torch.from_numpy(np.array(Image.open(piece.path)))[None] / 255


def centre(picture: Tensor, size: int) -> Tensor:
    """The short side resized, the centre kept, in eight bit: ``[1, size, size, 3]``."""
    height, width = picture.shape[1:3]
    scale = size / min(height, width)
    resized = F.interpolate(
        picture.movedim(-1, 1),
        size=(round(height * scale), round(width * scale)),
        mode="bicubic",
        antialias=True,
    )
    top, left = (resized.shape[2] - size) // 2, (resized.shape[3] - size) // 2
    cut = resized[..., top : top + size, left : left + size]
    return (cut.clamp(0, 1) * 255).round().movedim(1, -1) / 255


def words(clip: Any, text: str) -> tuple[Tensor, Tensor]:
    """States of the plain text, tokenised by transformers and cut to one window."""
    tokenizer = clip.tokenizer.clip_l.tokenizer
    ids = tokenizer(text, truncation=True, max_length=77, padding="max_length")["input_ids"]
    return clip.encode_from_tokens({"l": [[(i, 1.0) for i in ids]]}, return_pooled=True)  # type: ignore[no-any-return]


@pytest.fixture
def calls(encoders: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each encoder ran."""
    seen: Counter[str] = Counter()

    def spy(holder: Any, method: str, name: str) -> None:
        original = getattr(holder, method)

        def count(*arguments: Any, **options: Any) -> Any:
            seen[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(holder, method, count)

    spy(encoders.vae, "encode", "vae")
    spy(encoders.clip, "encode_from_tokens", "clip")
    spy(encoders.clip_vision.model, "forward", "vision")
    return seen


ALL = {"vae": 5, "clip": 5, "vision": 6}
"""One caption comes twice; beside the rows, an empty text (also a caption) and an empty picture."""


def opts(cache: Any, **more: Any) -> Any:
    return cache.Options(**{"size": SIZE, "dtype": "float32", **more})


def everything(cached: Any) -> dict[str, Tensor]:
    return cached.read(range(len(cached)))  # type: ignore[no-any-return]


def same(one: Any, other: Any) -> bool:
    first, second = everything(one), everything(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("kind", ["pooled", "hidden"])
def test_features_are_those_of_the_hosts_encoders(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path, kind: str
) -> None:
    cached = cache.fill(tmp_path / "cache", rows, encoders, opts(cache, image=kind))
    found = everything(cached)
    assert set(found) == {"latents", "size", "text", "pooled", "image"}
    assert len(cached) == len(rows)
    for number, row in enumerate(rows):
        latents = encoders.vae.encode(centre(shown(row), SIZE))
        assert_close(found["latents"][number : number + 1], latents)
        states, pooled = words(encoders.clip, row.text)
        assert_close(found["text"][number : number + 1], states)
        assert_close(found["pooled"][number : number + 1], pooled)
        out = encoders.clip_vision.encode_image(shown(row, reference=True))
        wanted = out.image_embeds if kind == "pooled" else out.penultimate_hidden_states
        assert_close(found["image"][number : number + 1], wanted, relative=1e-5)
    assert_close(cached.no_text, words(encoders.clip, "")[0])
    assert_close(cached.no_pooled, words(encoders.clip, "")[1])
    if kind == "pooled":
        assert torch.equal(cached.no_image, torch.zeros(1, POOLED))
    else:
        zero = torch.zeros(1, 3, SEEN, SEEN)
        wanted = encoders.clip_vision.model(pixel_values=zero, intermediate_output=-2)[1]
        assert_close(cached.no_image, wanted, relative=1e-5)
        assert cached.no_image.shape == (1, 5, HIDDEN)
    assert cached.no_face is None
    assert not any(tensor.is_inference() for tensor in [*found.values(), cached.no_text])


def test_half_precision_is_the_rounded_single(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path
) -> None:
    single = cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    for name in ("float16", "bfloat16"):
        half = cache.fill(tmp_path / "cache", rows, encoders, opts(cache, dtype=name))
        dtype = getattr(torch, name)
        for part, tensor in everything(single).items():
            wanted = tensor if part == "size" else tensor.to(dtype)
            assert torch.equal(everything(half)[part], wanted), part


def test_sizes_are_those_sdxl_is_told(cache: Any, encoders: Any, rows: Any, tmp_path: Path) -> None:
    cached = cache.fill(tmp_path / "cache", rows, encoders, opts(cache, mirror=True))
    assert (
        everything(cached)["size"].tolist()
        == [
            [40, 50, 0, 4, SIZE, SIZE],  # resized to 32 x 40
            [64, 32, 16, 0, SIZE, SIZE],
            [33, 97, 0, 31, SIZE, SIZE],  # 32 x 94
            [20, 20, 0, 0, SIZE, SIZE],
            [50, 40, 4, 0, SIZE, SIZE],
        ]
        * 2
    )


def test_mirrored_rows_follow_the_others(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path
) -> None:
    plain = cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    cached = cache.fill(tmp_path / "cache", rows, encoders, opts(cache, mirror=True))
    count = len(rows)
    assert len(cached) == 2 * count
    found = everything(cached)
    for name, tensor in everything(plain).items():
        assert torch.equal(found[name][:count], tensor)
    for number, row in enumerate(rows):
        latents = encoders.vae.encode(centre(shown(row), SIZE).flip(2))
        assert_close(found["latents"][count + number][None], latents)
        seen = centre(shown(row, reference=True), SEEN).flip(2)
        embeds = encoders.clip_vision.encode_image(seen).image_embeds
        assert_close(found["image"][count + number][None], embeds, relative=1e-5)
    assert torch.equal(found["text"][count:], found["text"][:count])


def test_faces_are_normed_or_raw(cache: Any, encoders: Any, rows: Any, tmp_path: Path) -> None:
    raw = torch.stack([vector(number) for number in range(len(rows))])
    for kind, wanted in (("raw", raw), ("normed", raw / raw.norm(dim=1, keepdim=True))):
        options = opts(cache, image=None, face=kind)
        without = cache.Encoders(encoders.vae, encoders.clip)
        cached = cache.fill(tmp_path / "cache", rows, without, options)
        found = everything(cached)
        assert "image" not in found and cached.no_image is None
        assert_close(found["face"], wanted)
        assert torch.equal(cached.no_face, torch.zeros(1, 512))
    both = cache.fill(tmp_path / "cache", rows, encoders, opts(cache, image="hidden", face="raw"))
    assert {"image", "face"} <= everything(both).keys()


def test_a_second_run_encodes_nothing(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path, calls: Counter[str]
) -> None:
    first = cache.fill(tmp_path / "cache", rows, encoders, opts(cache, image="hidden"))
    assert calls == ALL
    told: list[Any] = []
    again = cache.fill(
        tmp_path / "cache",
        rows,
        encoders,
        opts(cache, image="hidden"),
        lambda *now: told.append(now),
    )
    assert calls == ALL and not told
    assert same(first, again)
    assert first.fingerprint == again.fingerprint


def test_only_what_differs_is_encoded(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path, calls: Counter[str], data: Any
) -> None:
    first = cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    calls.clear()
    cache.fill(tmp_path / "cache", rows, encoders, opts(cache, image="hidden"))
    assert calls == {"vision": 6}
    calls.clear()
    cache.fill(tmp_path / "cache", rows, encoders, opts(cache, size=64))
    assert calls == {"vae": 5}
    calls.clear()
    draw(rows[2].image.path, 1234, SHAPES[2])
    changed = cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    assert calls == {"vae": 1, "vision": 1}
    assert changed.fingerprint != first.fingerprint
    moved = torch.tensor([False, False, True, False, False])
    before, after = everything(first), everything(changed)
    assert torch.equal((before["latents"] != after["latents"]).flatten(1).any(1), moved)
    calls.clear()
    cache.fill(tmp_path / "cache", rows[1:4], encoders, opts(cache))
    assert not calls


def test_another_encoder_encodes_anew(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path, calls: Counter[str]
) -> None:
    cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    calls.clear()
    encoders.clip_vision.model.vision_model.post_layernorm.bias[3] += 0.5
    found = cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    assert calls == {"vision": 6}
    wanted = encoders.clip_vision.encode_image(shown(rows[0])).image_embeds
    assert_close(everything(found)["image"][:1], wanted, relative=1e-5)
    calls.clear()
    skipped = encoders.clip.clone()
    skipped.clip_layer(-2)
    other = cache.Encoders(encoders.vae, skipped, encoders.clip_vision)
    clipped = cache.fill(tmp_path / "cache", rows, other, opts(cache))
    assert not calls["vae"] and not calls["vision"]
    assert not torch.equal(clipped.no_text, found.no_text)


class Stop(BaseException):
    """As Ctrl-C, which pytest would take for its own."""


@pytest.mark.parametrize("after", [1, 4, 7, 11])
def test_an_interruption_loses_nothing(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path, calls: Counter[str], after: int
) -> None:
    whole = cache.fill(tmp_path / "whole", rows, encoders, opts(cache, image="hidden"))
    calls.clear()

    def stop(done: int, total: int) -> None:
        assert total == 14  # 5 latents, 4 different texts, 5 references
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        cache.fill(tmp_path / "cut", rows, encoders, opts(cache, image="hidden"), stop)
    told: list[int] = []
    resumed = cache.fill(
        tmp_path / "cut",
        rows,
        encoders,
        opts(cache, image="hidden"),
        lambda done, total: told.append(total),
    )
    assert len(told) == 14 - after
    assert calls == ALL  # in both runs together
    assert same(whole, resumed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "cut": lambda content: content[:-100],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_found_and_made_anew(
    cache: Any,
    encoders: Any,
    rows: Any,
    tmp_path: Path,
    calls: Counter[str],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    first = everything(cache.fill(tmp_path / "cache", rows, encoders, opts(cache)))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    calls.clear()
    (shard,) = (tmp_path / "cache").glob("latents-*/*.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    assert "is damaged" in caplog.text
    assert calls == {"vae": 5}
    assert all(torch.equal(kept[name], tensor) for name, tensor in everything(again).items())


def test_numbers_that_overflow_name_the_row(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoders.vae.encode
    huge = [0]

    def encode(pixels: Tensor) -> Tensor:
        huge[0] += 1
        return real(pixels) * (1e6 if huge[0] == 3 else 1)

    monkeypatch.setattr(encoders.vae, "encode", encode)
    with pytest.raises(Exception, match=r"rows.jsonl line 3: its latents .* float16") as caught:
        cache.fill(tmp_path / "cache", rows, encoders, opts(cache, dtype="float16"))
    assert type(caught.value).__name__ == "DataError"


def test_a_file_that_went_after_the_check_is_named(
    cache: Any, encoders: Any, rows: Any, tmp_path: Path
) -> None:
    rows[3].image.path.unlink()
    with pytest.raises(Exception, match=r"rows.jsonl line 4: .*3\.png' cannot be read"):
        cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    rows[3].image.path.write_bytes(b"no picture")
    with pytest.raises(Exception, match=r"rows.jsonl line 4: .*3\.png' cannot be decoded"):
        cache.fill(tmp_path / "cache", rows, encoders, opts(cache))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 30}, "30 is no multiple of 8"),
        ({"image": None}, "Nothing of the reference"),
        ({"face": "raw"}, "2 rows have no face vector"),
        ({"reference_size": 27}, "reads patches of 14"),
    ],
)
def test_options_that_cannot_work_are_refused(
    cache: Any, data: Any, encoders: Any, rows: Any, tmp_path: Path, changes: Any, message: str
) -> None:
    faceless = [data.Row(row.origin, row.image, row.text) for row in rows[:2]]
    with pytest.raises(Exception, match=message):
        cache.fill(tmp_path / "cache", faceless, encoders, opts(cache, **changes))
    with pytest.raises(Exception, match="There are no rows"):
        cache.fill(tmp_path / "cache", [], encoders, opts(cache))
    blind = cache.Encoders(encoders.vae, encoders.clip)
    with pytest.raises(Exception, match="there is no image encoder"):
        cache.fill(tmp_path / "cache", rows, blind, opts(cache))
    with pytest.raises(Exception, match="no encoder of the host"):
        odd = cache.Encoders(encoders.vae, object(), encoders.clip_vision)
        cache.fill(tmp_path / "cache", rows, odd, opts(cache))


def test_batches_are_the_rows_in_order(
    cache: Any, host: Any, encoders: Any, rows: Any, tmp_path: Path
) -> None:
    cached = cache.fill(tmp_path / "cache", rows, encoders, opts(cache))
    sequence = host.library("ip_adapter.train.order")
    whole = everything(cached)
    shuffled = [*sequence.permutation(5, 3, 0), *sequence.permutation(5, 3, 1)]
    stream = cache.batches(cached, 4, 3)
    first, second = next(stream), next(stream)
    for start, batch in ((0, first), (4, second)):
        for name, tensor in batch.items():
            assert torch.equal(tensor, whole[name][shuffled[start : start + 4]]), name
    assert stream.position == sequence.Position(1, 3)
    third = next(stream)
    resumed = next(cache.batches(cached, 4, 3, sequence.Position(1, 3)))
    assert all(torch.equal(third[name], resumed[name]) for name in third)
    halves = [next(cache.batches(cached, 2, 3, rank=rank, world=2)) for rank in range(2)]
    for name, tensor in first.items():
        assert torch.equal(torch.cat([half[name] for half in halves]), tensor)
