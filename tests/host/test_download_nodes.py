"""The nodes that list and fetch models, in the real host, against a hub on this machine."""

from __future__ import annotations

import hashlib
import random
import runpy
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.host.disk import Disk, make
from tests.hub_server import Hub, serving

pytestmark = pytest.mark.host

PIECE = 64 * 1024
ADAPTER, ENCODER = (random.Random(name).randbytes(4 * PIECE) for name in ("adapter", "encoder"))
VIT_H = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"


@pytest.fixture
def disk(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    return make(host, monkeypatch, tmp_path)


@pytest.fixture
def hub(host: Any, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """huggingface_hub's default address for a while, with small files under published names."""
    library = host.library("ip_adapter.downloads")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
    with serving() as running:
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        changed = []
        for one in library.DOWNLOADS:
            content = ADAPTER if one.purpose else ENCODER
            running.files[f"{one.remote.repository}/{one.remote.path}"] = content
            digest = hashlib.sha256(content).hexdigest()
            changed.append(replace(one, remote=replace(one.remote, sha256=(digest,))))
        monkeypatch.setattr(library, "DOWNLOADS", tuple(changed))
        yield running


@pytest.fixture
def shown(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(host.library("ip_adapter.nodes.downloads"), "show_on_node", texts.append)
    return texts


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the host's progress bars were told."""
    import comfy.utils

    told: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int) -> None:
            assert total == self.total
            told.append((value, total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    return told


def download(host: Any, model: str, accept: bool = False, **options: bool) -> Any:
    return host.node("ImagePromptDownload").execute(model, accept, **options).result


def failure(host: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(host.library("ip_adapter.errors").DownloadError) as caught:
        download(host, *arguments, **options)
    return str(caught.value)


# List


def test_the_list_knows_installed_files_without_a_network(
    host: Any, disk: Disk, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    disk.adapter("sd15_vit-G", "any name.safetensors")
    disk.adapter("plus_sd15", "another.safetensors")
    disk.encoder("bigG", "eye.safetensors")
    monkeypatch.setattr(socket.socket, "__init__", refuse)
    (text,) = host.node("ImagePromptModels").execute("SD 1.5", "all").result
    assert shown == [text]
    first, *rest = text.split("\n\n")[0].splitlines()
    assert first == f"3 of {len(rest)} installed."
    lines = {line.split(" ")[0].rstrip(":"): line for line in rest}
    assert lines["sd15/base-vit-g"].endswith("Installed as any name.safetensors.")
    assert "Perhaps installed, as another.safetensors" in lines["sd15/plus"]
    assert lines["encoder/vit-bigg"].endswith("Installed as eye.safetensors.")
    assert "Not installed: https://huggingface.co/h94/" in lines["sd15/full-face"]
    assert "44 MB, Apache-2.0" in lines["sd15/full-face"]
    assert "non-commercial" in lines["sd15/faceid"]
    assert not [name for name in lines if name.startswith(("sdxl", "kolors"))]


def test_the_filters_are_those_of_the_catalogue(host: Any, disk: Disk, shown: list[str]) -> None:
    node = host.node("ImagePromptModels")
    family, purpose = node.define_schema().inputs
    assert family.options == ["all", "SD 1.5", "SDXL", "Kolors"]
    assert purpose.options == ["all", *host.library("ip_adapter.catalogue").PURPOSES]
    (text,) = node.execute("Kolors", "light").result
    assert text == "Nothing was published for this purpose and family."
    (text,) = node.execute("SDXL", "anime").result
    noobai = "sdxl/noobai (anime): 1.4 GB, see its page. Needs encoder/vit-bigg."
    assert text.startswith(f"0 of 2 installed.\n{noobai}")


def test_both_nodes_look_again_when_files_change(host: Any, disk: Disk) -> None:
    nodes = [host.node("ImagePromptModels"), host.node("ImagePromptDownload")]
    before = [node.fingerprint_inputs() for node in nodes]
    assert [node.fingerprint_inputs() for node in nodes] == before
    disk.adapter("sd15", "new.safetensors")
    assert not set(before) & {node.fingerprint_inputs() for node in nodes}


# Download


def test_an_adapter_and_its_encoder_arrive_where_the_loaders_look(
    host: Any, hub: Hub, disk: Disk, shown: list[str], bars: list[tuple[int, int]]
) -> None:
    import folder_paths

    path, name = download(host, "sd15/base")
    assert name == "ip-adapter_sd15.safetensors"
    assert Path(path) == disk.root / "ipadapter" / name
    assert Path(path).read_bytes() == ADAPTER
    assert (disk.root / "clip_vision" / VIT_H).read_bytes() == ENCODER
    for folder, file in (("ipadapter", name), ("clip_vision", VIT_H)):
        assert folder_paths.get_filename_list(folder) == [file]
        assert [one.name for one in (disk.root / folder).iterdir()] == [file]
    (text,) = shown
    assert text.count("downloaded") == 2
    assert text.endswith("Refresh the node list (R) to find it in the loaders.")
    assert len(bars) == 2 * 4


def test_the_bar_counts_whole_megabytes(host: Any, bars: list[tuple[int, int]]) -> None:
    bar = host.library("ip_adapter.host.downloading")._Bar()
    for done, size in ((10 << 20, 45 << 20), (45 << 20, 45 << 20), (1000, 2000), (2000, 2000)):
        bar(done, size)
    assert bars == [(10, 45), (45, 45), (0, 1), (0, 1)]


def test_what_is_installed_is_not_fetched_again(
    host: Any, hub: Hub, disk: Disk, shown: list[str]
) -> None:
    disk.adapter("sd15_vit-G", "any name.safetensors")
    disk.encoder("bigG", "eye.safetensors")
    path, name = download(host, "sd15/base-vit-g")
    assert name == "any name.safetensors"
    assert Path(path) == disk.root / "ipadapter" / name
    assert shown[0].count("Nothing was downloaded.") == 2
    assert "Refresh" not in shown[0]
    assert hub.seen == []


def test_an_unaccepted_licence_is_refused_before_anything(
    host: Any, hub: Hub, disk: Disk, shown: list[str]
) -> None:
    message = failure(host, "sdxl/instantid")
    assert "non-commercial research only" in message
    assert "https://huggingface.co/InstantX/InstantID" in message
    assert hub.seen == [] and shown == []
    download(host, "sdxl/instantid", True)
    assert "face models antelopev2" in shown[0]
    assert (disk.root / "ipadapter" / "ip-adapter.bin").read_bytes() == ADAPTER


def test_the_stop_button_keeps_what_has_arrived(
    host: Any, hub: Hub, disk: Disk, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(management, "throw_exception_if_processing_interrupted", ask)
        with pytest.raises(management.InterruptProcessingException):
            download(host, "sd15/base", with_encoder=False)
    (partial,) = (disk.root / "ipadapter").iterdir()
    assert partial.read_bytes() == ADAPTER[: 2 * PIECE]
    assert host.library("ip_adapter.host.folders").names("ipadapter") == []

    path, _ = download(host, "sd15/base", with_encoder=False)
    assert hub.ranges == ["", f"bytes={2 * PIECE}-"]
    assert Path(path).read_bytes() == ADAPTER


def test_a_damaged_file_reaches_no_loader(host: Any, hub: Hub, disk: Disk) -> None:
    hub.damaged = True
    assert "It was deleted" in failure(host, "sd15/base", with_encoder=False)
    assert list((disk.root / "ipadapter").iterdir()) == []


def test_the_names_are_those_of_the_list(host: Any) -> None:
    model = host.node("ImagePromptDownload").define_schema().inputs[0]
    assert model.options == list(host.library("ip_adapter.downloads").NAMES)
    assert len(model.options) == len(host.library("ip_adapter.catalogue").PUBLISHED) + 3


# The command line knows the folders without the host


def test_folders_without_the_host_are_those_of_the_host(
    host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import folder_paths

    models = tmp_path / "models"
    paths = {"clip_vision": ([str(models / "clip_vision")], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    yaml = tmp_path / "extra_model_paths.yaml"
    yaml.write_text(
        "other:\n  base_path: shelf\n  ipadapter: |\n    a\n    ../b\n  clip_vision: eyes\n"
        "first:\n  base_path: /elsewhere\n  is_default: true\n  clip_vision: c/\n  ipadapter: a\n"
        "plain:\n  clip_vision: models/clip_vision\n  ipadapter: shelf/a\n"
        "again:\n  is_default: true\n  ipadapter: shelf/a\n"
    )
    # By its file: the name `utils` may be another module's by now.
    file = Path(folder_paths.__file__).parent / "utils" / "extra_config.py"
    runpy.run_path(str(file))["load_extra_path_config"](str(yaml))
    host.library("ip_adapter.host.folders").register()
    found = host.library("ip_adapter.model_folders").of_comfyui(tmp_path)
    for kind, ours in (("ipadapter", found.adapters), ("clip_vision", found.encoders)):
        assert [str(path) for path in ours] == folder_paths.get_folder_paths(kind)
