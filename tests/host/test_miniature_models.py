"""The miniature's files in the host: its VAE, and its folder as a pack for the standard loaders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniature import assemble, family
from tests.conftest import ROOT
from tests.miniature_parts import held_out, unet_latents

pytestmark = pytest.mark.host


def test_the_shipped_vae_paints_held_out_pictures_again(registered: Any) -> None:
    import comfy.sd

    vae = comfy.sd.VAE(sd=assemble.vae())
    pictures = held_out()
    latents = unet_latents(vae, pictures)
    assert latents.shape == (16, 4, 8, 8) and 0.85 < float(latents.std()) < 1.15
    again = vae.decode(latents / 0.18215).movedim(-1, 1)
    errors = (again - pictures).square().mean((1, 2, 3))
    ratios = -10 * errors.log10()
    assert float(ratios.min()) > 20 and float(ratios.mean()) > 24


@pytest.fixture
def as_pack(registered: Any, host: Any) -> Iterator[None]:
    """The folder, loaded as the host loads what is in custom_nodes; its model folders go again."""
    import folder_paths

    kept = {
        name: (list(paths), set(endings))
        for name, (paths, endings) in folder_paths.folder_names_and_paths.items()
    }
    folder_paths.filename_list_cache.clear()
    loading = host.nodes.load_custom_node(str(ROOT / "miniature"))
    assert asyncio.run(loading)
    yield
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(kept)
    folder_paths.filename_list_cache.clear()


@pytest.mark.usefixtures("as_pack")
@pytest.mark.parametrize(
    ("node", "input_name", "path"),
    [
        ("CheckpointLoaderSimple", "ckpt_name", family.BASE),
        ("UNETLoader", "unet_name", family.FINE_TUNE),
        ("ControlNetLoader", "control_net_name", family.CONTROLNET),
        ("CLIPVisionLoader", "clip_name", family.CLIP_VISION),
    ],
)
def test_a_linked_folder_puts_its_files_into_the_standard_loaders(
    host: Any, node: str, input_name: str, path: Path
) -> None:
    chosen = host.node(node)
    listed = chosen.INPUT_TYPES()["required"][input_name][0]
    name = path.relative_to(family.MODELS).as_posix().partition("/")[2]
    assert name in listed
    made = getattr(chosen(), chosen.FUNCTION)(name, *(["default"] if node == "UNETLoader" else []))
    assert all(part is not None for part in made)


@pytest.mark.usefixtures("as_pack")
def test_a_linked_folder_puts_its_adapters_into_this_pack_s_loader(host: Any) -> None:
    folders = host.library("ip_adapter.host.folders")
    listed = {name for name in folders.names("ipadapter") if name.startswith("miniature")}
    assert listed == {"miniature_global.safetensors", "miniature_plus.safetensors"}
