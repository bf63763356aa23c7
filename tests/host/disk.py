"""Model folders of a test's own, filled with files that are headers over holes of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.synthetic import adapters, catalogue
from tests.synthetic.catalogue import ROWS
from tests.synthetic.layouts import clip_vision_h

TOWERS = {
    "ViT-H": (32, 1280, 1024, 257),
    "bigG": (48, 1664, 1280, 257),
    "ViT-L": (24, 1024, 768, 257),
    "ViT-L-336": (24, 1024, 768, 577),
}
"""Depth, width, projected width and positions, as the towers' publishers state them."""


def fake_model(layers: int, context: int, adm: int | None = None) -> Any:
    """What is asked of a MODEL: its cross-attention layers, and the size of its vector."""
    attention = SimpleNamespace(
        to_q=SimpleNamespace(out_features=320),
        to_k=SimpleNamespace(in_features=context),
        heads=8,
    )
    group = SimpleNamespace(transformer_blocks=[SimpleNamespace(attn2=attention)] * layers)
    unet = SimpleNamespace(input_blocks=[[group]], middle_block=[], output_blocks=[])
    return SimpleNamespace(
        get_model_object=lambda name: unet, model=SimpleNamespace(adm_channels=adm)
    )


MODELS = {
    "SD 1.5": fake_model(16, 768),
    "SD 2.x": fake_model(16, 1024),
    "SDXL": fake_model(70, 2048, 2816),
    "Kolors": fake_model(70, 2048, 5632),
}


@dataclass(frozen=True)
class Disk:
    """Model folders of their own, and the loader that looks into them."""

    root: Path
    host: Any

    @property
    def automatic(self) -> Any:
        return self.host.library("ip_adapter.host.automatic")

    @property
    def installed(self) -> Any:
        return self.host.library("ip_adapter.host.installed")

    def find(self, family: str, purpose: str, **options: Any) -> Any:
        return self.automatic.find(MODELS[family], purpose, **options)

    def adapter(self, row: str, name: str, **metadata: str) -> Path:
        """A hollow adapter of the published shapes: true header, no bytes of weights."""
        path = self.root / "ipadapter" / name
        if metadata:
            tensors = catalogue.hollow(catalogue.layout(ROWS[row]), ROWS[row].dtype)
            return adapters.write_sparse(tensors, path, metadata)
        return adapters.write_hollow(ROWS[row], path)

    def encoder(self, tower: str, name: str) -> Path:
        """A header of a vision tower over a hole of zeros of the true size."""
        depth, width, projected, positions = TOWERS[tower]
        layout = clip_vision_h(depth, width, projected)
        layout["vision_model.embeddings.position_embedding.weight"] = (positions, width)
        return adapters.write_sparse(catalogue.hollow(layout), self.root / "clip_vision" / name)

    def converted(self, row: str, name: str) -> Path:
        """A FaceID adapter that lost its LoRA."""
        layout = {k: s for k, s in catalogue.layout(ROWS[row]).items() if "_lora." not in k}
        return adapters.write_sparse(catalogue.hollow(layout), self.root / "ipadapter" / name)

    def lora(self, row: str, name: str) -> Path:
        """A companion LoRA: true header, hole of zeros."""
        tensors = catalogue.companion(ROWS[row], catalogue.hollow(catalogue.layout(ROWS[row])))
        return adapters.write_sparse(tensors, self.root / "loras" / name)

    def failure(self, family: str, purpose: str, **options: Any) -> str:
        with pytest.raises(self.host.library("ip_adapter.errors").MissingFileError) as caught:
            self.find(family, purpose, **options)
        return str(caught.value)


def make(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    """Point the host to empty folders for adapters, image encoders and LoRAs."""
    import folder_paths

    root = tmp_path / "models"
    folders = {}
    for name in ("ipadapter", "clip_vision", "loras"):
        (root / name).mkdir(parents=True)
        folders[name] = ([str(root / name)], {".safetensors", ".bin"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    # Nothing here is a published file; hashing holes of a gigabyte would only take time.
    monkeypatch.setattr(host.library("ip_adapter.host.digests"), "sha256", lambda path: "")
    return Disk(root, host)
