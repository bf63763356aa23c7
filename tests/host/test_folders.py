from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host


@pytest.fixture
def folders(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The pack's folders, registered anew over an empty models directory."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    library = host.library("ip_adapter.host.folders")
    library.register()
    for name in (library.ADAPTERS, library.IMAGE_PROMPTS):
        (tmp_path / "models" / name).mkdir(parents=True)
    return library


def test_only_weights_are_listed_from_sub_folders_too(folders: Any, tmp_path: Path) -> None:
    root = tmp_path / "models" / "ipadapter"
    (root / "faces").mkdir()
    for name in ("a.safetensors", "b.bin", "readme.txt", "faces/c.safetensors", ".hidden.recipe"):
        (root / name).touch()
    assert folders.names(folders.ADAPTERS) == [
        "a.safetensors",
        "b.bin",
        os.path.join("faces", "c.safetensors"),
    ]
    found = folders.find(folders.ADAPTERS, os.path.join("faces", "c.safetensors"))
    assert found == root / "faces" / "c.safetensors"


def test_configured_folders_come_first_and_are_kept(folders: Any, tmp_path: Path) -> None:
    import folder_paths

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder_paths.folder_names_and_paths["ipadapter"] = ([str(elsewhere)], set())
    folders.register()
    folders.register()
    paths, extensions = folder_paths.folder_names_and_paths["ipadapter"]
    assert paths == [str(elsewhere), str(tmp_path / "models" / "ipadapter")]
    assert ".safetensors" in extensions and ".txt" not in extensions


def test_a_missing_adapter_names_folder_neighbours_and_link(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"no files in .*models/ipadapter\. Put .*h94/IP-Adapter"):
        folders.find(folders.ADAPTERS, "ip-adapter_sd15.safetensors")
    (tmp_path / "models" / "ipadapter" / "ip-adapter_sd15.bin").touch()
    with pytest.raises(Exception, match=r"such as ip-adapter_sd15\.bin"):
        folders.find(folders.ADAPTERS, "ip-adapter_sd15.safetensors")


def test_an_empty_folder_is_said_on_the_node(folders: Any, tmp_path: Path) -> None:
    (option,) = folders.choices(folders.ADAPTERS)
    assert option == "(no files in models/ipadapter)"
    with pytest.raises(Exception, match="no files in"):
        folders.find(folders.ADAPTERS, option)
    (tmp_path / "models" / "ipadapter" / "a.bin").touch()
    assert folders.choices(folders.ADAPTERS) == ["a.bin"]


def test_files_are_numbered_and_stay_in_their_folder(folders: Any, tmp_path: Path) -> None:
    root = tmp_path / "models" / "image_prompts"
    assert folders.new_file(folders.IMAGE_PROMPTS, "cat") == root / "cat_00001.safetensors"
    (root / "cat_00001.safetensors").touch()
    (root / "cat_00007.safetensors").touch()
    (root / "cat_final.safetensors").touch()
    assert folders.new_file(folders.IMAGE_PROMPTS, "cat") == root / "cat_00008.safetensors"
    assert folders.new_file(folders.IMAGE_PROMPTS, "people/anna").parent == root / "people"


@pytest.mark.parametrize("prefix", ["../evil", "/etc/evil", "a/../../evil", "", "."])
def test_files_never_leave_their_folder(folders: Any, prefix: str) -> None:
    with pytest.raises(Exception, match="leads out of"):
        folders.new_file(folders.IMAGE_PROMPTS, prefix)


def test_a_changed_file_has_another_stamp(folders: Any, tmp_path: Path) -> None:
    path = tmp_path / "models" / "ipadapter" / "a.safetensors"
    assert folders.stamp(folders.ADAPTERS, "a.safetensors") == "missing"
    path.write_bytes(b"1")
    before = folders.stamp(folders.ADAPTERS, "a.safetensors")
    path.write_bytes(b"22")
    assert folders.stamp(folders.ADAPTERS, "a.safetensors") != before
