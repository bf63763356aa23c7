"""A real ComfyUI keeps no trace of what went before: other weights, other references, interrupts,
errors. Every error names what was found and what to do.

The host runs with its classic cache, which forgets all but the last prompt. So a prompt that comes
back is sampled anew, and memory does not grow by the results the host's default cache would keep.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.client import Json
from scripts.server import PromptFailed, PromptInterrupted, PromptRejected, Server
from tests.host.server_fixtures import GOOD, changed, executed, node, picture, running
from tests.synthetic import adapters
from tests.synthetic.models import ADAPTER_BASE, ADAPTER_FACE, ADAPTER_PLUS, CHECKPOINT

pytestmark = pytest.mark.host

APPLY, ENCODE, LOAD = "ImagePromptApply", "ImagePromptEncode", "ImagePromptLoadAdapter"
MODEL = [node(GOOD, "CheckpointLoaderSimple"), 0]
SAMPLER = node(GOOD, "KSampler")

ELSEWHERE = "from_elsewhere.safetensors"
"""The base adapter once more, in a folder that only extra_model_paths.yaml names."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("errors")
    elsewhere = base / "elsewhere" / "adapters"
    elsewhere.mkdir(parents=True)
    (elsewhere / ELSEWHERE).symlink_to(model_files / ADAPTER_BASE)
    (elsewhere / "readme.txt").write_text("no model")
    yaml = base / "extra_model_paths.yaml"
    yaml.write_text(f"other:\n  base_path: {elsewhere.parent}\n  ipadapter: adapters\n")
    arguments = ("--cache-classic", "--extra-model-paths-config", str(yaml))
    with running(base, model_files, *arguments) as started:
        yield started


@pytest.fixture(scope="module")
def good(server: Server) -> np.ndarray:
    """The picture of the good prompt, before anything else has run."""
    return picture(server.run(GOOD, timeout=300))


def sampled(server: Server, prompt: Json) -> np.ndarray:
    """A run's picture, which must not come from the host's cache."""
    result = server.run(prompt, timeout=300)
    assert SAMPLER in executed(result)
    return picture(result)


# What went before


def test_another_weight_leaves_no_trace(server: Server, good: np.ndarray) -> None:
    weaker = sampled(server, changed(GOOD, APPLY, weight=0.35))
    assert np.abs(weaker - good).max() > 10
    assert np.array_equal(sampled(server, GOOD), good)


def test_weight_zero_is_the_picture_without_us(server: Server, good: np.ndarray) -> None:
    without = sampled(server, changed(GOOD, "KSampler", model=MODEL))
    assert np.array_equal(sampled(server, changed(GOOD, APPLY, weight=0)), without)
    assert np.abs(without - good).max() > 10


def test_host_that_dropped_everything_gives_the_same_picture(
    server: Server, good: np.ndarray
) -> None:
    server.run(GOOD)
    before = server.rss_bytes()
    server.free()
    deadline = time.monotonic() + 30
    while server.rss_bytes() > before - 500e6 and time.monotonic() < deadline:
        time.sleep(0.1)  # the host frees at its leisure; the image encoder alone is 1.3 GB
    result = server.run(GOOD, timeout=300)
    assert result.cached() == set() and executed(result) == set(GOOD)
    assert np.array_equal(picture(result), good)


def test_interrupt_leaves_no_trace(server: Server, good: np.ndarray) -> None:
    steps: list[int] = []

    def stop_at_the_fifth_step(event: Json) -> None:
        if event["type"] == "progress" and event["data"]["node"] == SAMPLER:
            steps.append(event["data"]["value"])
            if len(steps) == 5:
                server.interrupt()

    # Only the steps differ, so the very MODEL that was interrupted is sampled again afterwards.
    with pytest.raises(PromptInterrupted):
        server.run(changed(GOOD, "KSampler", steps=2000), on_event=stop_at_the_fifth_step)
    assert 5 <= len(steps) < 1000
    after = server.run(GOOD)
    assert executed(after) >= {SAMPLER} and node(GOOD, APPLY) in after.cached()
    assert np.array_equal(picture(after), good)


DOUBLINGS = 7


def many_tokens() -> Json:
    """The good prompt with its image prompt joined to itself again and again: 512 tokens."""
    prompt = copy.deepcopy(GOOD)
    last = node(GOOD, ENCODE)
    for number in range(DOUBLINGS):
        both = {"first": [last, 0], "second": [last, 0]}
        last = f"join_{number}"
        prompt[last] = {"class_type": "ImagePromptJoin", "inputs": both}
    return changed(prompt, APPLY, image_prompt=[last, 0])


def reference(number: int) -> bytes:
    """A PNG of one colour and a slanted edge, 1024 x 1024: 12 MB once loaded."""
    image = Image.new("RGB", (1024, 1024), (40, 12 * number % 256, -9 * number % 256))
    image.paste((200, 180, 7 * number % 256), (0, 0, 100 + 30 * number, 512))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_memory_does_not_grow_with_prompts(server: Server) -> None:
    """Twenty prompts with a new weight each, twelve of them with a new reference.

    Measured on Linux: 0.5 MB after all twenty. The limit is 1 MB per prompt. A run that is kept
    (keys and values of 512 tokens in 16 layers) was seen as 26 MB per prompt, a reference that is
    kept as 13 MB; an adapter would be 10 MB, an image prompt 3 MB. The frozen pack lost 194 MB.

    An allocator takes a step of its own now and then: 24 MB were seen once on a busy machine. So
    what is too much is looked at again. A step does not come back; what is kept, is kept each time.
    """
    prompt = many_tokens()
    seen: set[bytes] = set()

    def run(count: int, references: int) -> None:
        nonlocal prompt
        for turn in range(count):
            number = len(seen)
            if turn < references:
                server.upload_image(f"reference_{number}.png", reference(number))
                prompt = changed(prompt, "LoadImage", image=f"reference_{number}.png")
            prompt = changed(prompt, APPLY, weight=0.3 + 0.02 * number)
            seen.add(sampled(server, prompt).tobytes())

    run(5, references=2)
    rounds: list[float] = []
    while len(rounds) < 3 and not any(grown < 20 * 1e6 for grown in rounds):
        before = server.private_bytes()
        run(20, references=12)
        rounds.append(server.private_bytes() - before)
    assert len(seen) == 5 + 20 * len(rounds)
    print("grown, MB:", [round(grown / 1e6, 1) for grown in rounds])
    assert min(rounds) < 20 * 1e6, rounds


# Refused before anything runs


MISSING = "no-such-adapter.safetensors"
WHERE_IT_IS = (
    f"'{MISSING}' is not in ",
    str(Path("models/ipadapter")),
    "such as ip-adapter",
    "https://huggingface.co/h94/IP-Adapter",
    "refresh the node list (R)",
)


@pytest.mark.parametrize(
    ("kind", "inputs", "reason", "words"),
    [
        (APPLY, {"weight": 99}, "value_bigger_than_max", ("weight", "99", "3.0")),
        (APPLY, {"weight": -99}, "value_smaller_than_min", ("weight", "-99", "-1.0")),
        (APPLY, {"image_prompt": None}, "required_input_missing", ("image_prompt",)),
        (APPLY, {"ip_adapter": MODEL}, "return_type_mismatch", ("ip_adapter", "MODEL")),
        (ENCODE, {"fit": "stretch"}, "value_not_in_list", ("fit", "stretch", "tile")),
        (LOAD, {"adapter_name": MISSING}, "custom_validation_failed", WHERE_IT_IS),
    ],
    ids=["above", "below", "missing", "type", "choice", "file"],
)
def test_bad_input_is_refused_before_anything_runs(
    server: Server, kind: str, inputs: dict[str, Any], reason: str, words: tuple[str, ...]
) -> None:
    history, log = set(server.get("/history")), len(server.log_text())
    with pytest.raises(PromptRejected) as caught:
        server.run(changed(GOOD, kind, **inputs))
    ((where, found),) = caught.value.details["node_errors"].items()
    (error,) = found["errors"]
    assert (where, error["type"]) == (node(GOOD, kind), reason)
    assert all(word in f"{error['message']}: {error['details']}" for word in words), error
    queue = server.get("/queue")
    assert queue == {"queue_running": [], "queue_pending": []}
    assert set(server.get("/history")) == history
    assert "Traceback" not in server.log_text()[log:]


# Refused while it runs


OTHER = "other"
"""Id of a second adapter loader."""


def with_other(name: str) -> Json:
    """The good prompt, applied with another adapter than it was encoded with."""
    prompt = changed(GOOD, APPLY, ip_adapter=[OTHER, 0])
    return prompt | {OTHER: {"class_type": LOAD, "inputs": {"adapter_name": name}}}


def encoded_with_other(name: str) -> Json:
    """The good prompt, joined to one that another adapter encoded from the same reference."""
    prompt = with_other(name)
    encode = node(GOOD, ENCODE)
    second = {**GOOD[encode]["inputs"], "ip_adapter": [OTHER, 0]}
    prompt["encode_other"] = {"class_type": ENCODE, "inputs": second}
    both = {"first": [encode, 0], "second": ["encode_other", 0]}
    prompt["join"] = {"class_type": "ImagePromptJoin", "inputs": both}
    return changed(prompt, APPLY, image_prompt=["join", 0])


@pytest.fixture
def ipadapter(server: Server) -> Iterator[Path]:
    """The host's folder; what a test adds is gone after it."""
    folder = server.base / "models" / "ipadapter"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


def fail(server: Server, prompt: Json, good: np.ndarray) -> PromptFailed:
    """Run a prompt that must fail; afterwards the good one must give its picture, sampled anew."""
    with pytest.raises(PromptFailed) as caught:
        server.run(prompt, timeout=300)
    assert np.array_equal(sampled(server, GOOD), good)
    return caught.value


class Code:
    """A pickle that would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.target,)


def lora(path: Path) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8)}, path)


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Log in to download</body></html>")


def truncated(path: Path) -> None:
    adapters.write_safetensors(adapters.base_sd15(adapters.NANO_WIDTHS), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wants_code(path: Path) -> None:
    torch.save({"image_proj": Code(path.with_name("code-ran"))}, path)


def checkpoint(path: Path) -> None:
    path.symlink_to((path.parents[1] / CHECKPOINT).resolve())


@pytest.mark.parametrize(
    ("write", "name", "words"),
    [
        (lora, "wrong.safetensors", ("a LoRA", "models/loras", "h94/IP-Adapter")),
        (web_page, "wrong.bin", ("a web page", "download link")),
        (truncated, "wrong.safetensors", ("damaged safetensors", "bytes on disk", "Delete it")),
        (wants_code, "wrong.bin", ("could run code", ".safetensors version")),
        (checkpoint, "wrong.safetensors", ("a whole checkpoint", "models/checkpoints")),
    ],
    ids=["LoRA", "web page", "truncated", "code", "checkpoint"],
)
def test_wrong_file_is_named_for_what_it_is(
    server: Server,
    good: np.ndarray,
    ipadapter: Path,
    write: Callable[[Path], None],
    name: str,
    words: tuple[str, ...],
) -> None:
    write(ipadapter / name)
    error = fail(server, with_other(name), good)
    assert error.node_type == LOAD
    assert error.exception_type.endswith("ip_adapter.CheckpointError")
    assert all(word in error.exception_message for word in (name, *words)), error
    assert not (ipadapter / "code-ran").exists()


def test_encoder_of_another_adapter_is_refused(
    server: Server, good: np.ndarray, ipadapter: Path
) -> None:
    tensors = adapters.base_sd15(adapters.NANO_WIDTHS, features=1280)
    adapters.write_safetensors(tensors, ipadapter / "vit-G.safetensors")
    error = fail(server, encoded_with_other("vit-G.safetensors"), good)
    assert error.node_type == ENCODE
    for word in ("vit-G.safetensors", "needs OpenCLIP ViT-bigG/14", "is OpenCLIP ViT-H/14"):
        assert word in error.exception_message


def test_image_prompt_of_another_adapter_is_refused(server: Server, good: np.ndarray) -> None:
    error = fail(server, with_other(ADAPTER_PLUS.name), good)
    assert error.node_type == APPLY
    for word in (ADAPTER_BASE.name, ADAPTER_PLUS.name, "Connect the same adapter"):
        assert word in error.exception_message


def test_model_of_another_width_is_refused(
    server: Server, good: np.ndarray, ipadapter: Path
) -> None:
    # Same seed, same projection: only the layers differ from the adapter that encoded.
    adapters.write_safetensors(adapters.base_sd15(), ipadapter / "wide.safetensors")
    error = fail(server, with_other("wide.safetensors"), good)
    assert error.node_type == APPLY
    for word in ("wide.safetensors", "320 wide", "is 32 wide", "trained for this very model"):
        assert word in error.exception_message


# Folders from extra_model_paths.yaml


def test_adapters_of_both_folders_are_listed_and_nothing_else(server: Server) -> None:
    expected = {ADAPTER_BASE.name, ADAPTER_PLUS.name, ADAPTER_FACE.name, ELSEWHERE}
    options = server.object_info(LOAD)["input"]["required"]["adapter_name"][1]["options"]
    assert set(options) == set(server.get("/models/ipadapter")) == expected


def test_adapter_from_the_other_folder_is_the_same(server: Server, good: np.ndarray) -> None:
    assert np.array_equal(sampled(server, with_other(ELSEWHERE)), good)
