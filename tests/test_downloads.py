"""What can be downloaded, what is installed, and the commands that say so and fetch it."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from ip_adapter import __main__ as command
from ip_adapter import downloads, model_folders, obtain
from ip_adapter.catalogue import NON_COMMERCIAL, PUBLISHED
from ip_adapter.downloads import DOWNLOADS, Download, Present
from ip_adapter.errors import DownloadError
from ip_adapter.hub import Remote
from scripts.parts import MODELS
from tests.conftest import ROOT
from tests.hub_server import Hub, serving
from tests.synthetic import adapters, layouts
from tests.synthetic.catalogue import ROWS

# The list


def test_every_published_adapter_and_its_encoder_has_one_name() -> None:
    names = [one.name for one in DOWNLOADS]
    assert len(set(names)) == len(names) == len(PUBLISHED) + 3
    assert all(re.fullmatch(r"(sd15|sdxl|kolors|encoder)/[a-z0-9-]+", name) for name in names)
    assert len({one.file for one in DOWNLOADS}) == len(names)
    for one, row in zip(DOWNLOADS, PUBLISHED, strict=False):
        assert one.file == row.file and one.licence == row.licence
        assert bool(one.encoder) == (row.encoder is not None)
        if row.encoder is not None:
            assert downloads.find(one.encoder).file == row.encoder.file


def test_files_are_where_their_page_says(one: Download) -> None:
    remote = one.remote
    folder = remote.path.rpartition("/")[0]
    where = f"{remote.repository}/tree/main" + (f"/{folder}" if folder else "")
    assert one.page == f"https://huggingface.co/{where}"
    assert Path(remote.path).suffix == Path(one.file).suffix
    if one.folder == "ipadapter":
        assert Path(remote.path).name == one.file
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in remote.sha256)


@pytest.fixture(params=DOWNLOADS, ids=lambda one: one.name)
def one(request: pytest.FixtureRequest) -> Download:
    return request.param  # type: ignore[no-any-return]


def test_pages_and_digests_are_the_catalogue_s() -> None:
    for one, row in zip(DOWNLOADS, PUBLISHED, strict=False):
        assert (one.file, one.page, one.remote.sha256) == (row.file, row.link, row.sha256)


def test_files_of_the_templates_are_the_same_there() -> None:
    by_file = {one.file: one for one in DOWNLOADS}
    shared = set(MODELS) & set(by_file)
    assert len(shared) >= 4
    for file in shared:
        found = by_file[file]
        assert MODELS[file] == (found.folder, found.remote.repository, found.remote.path)


def test_sizes_are_those_of_the_tensors(one: Download) -> None:
    """Numbers times bytes; some published .bin files hold a projection twice, or in float32."""
    rows = [row for row in ROWS.values() if row.file == one.file]
    if not rows:
        # Encoders: parameters of the published towers in the precision of the file.
        numbers = {"encoder/vit-h": 632_076_800 * 4, "encoder/vit-bigg": 1_844_907_264 * 2}
        expected = numbers.get(one.name)
        assert (one.size is None) == (expected is None)
        assert expected is None or one.size == pytest.approx(expected, rel=0.001)
        return
    (row,) = rows
    if row.bytes is not None:
        assert one.size == row.bytes
    else:
        assert one.size == pytest.approx(row.parameters * row.dtype.itemsize, rel=0.01)


def test_face_adapters_need_face_models_and_a_licence(one: Download) -> None:
    is_face = one.purpose in ("face identity", "face portrait")
    assert one.is_restricted == is_face == ("face models" in one.needs)
    if is_face:
        expected = "antelopev2" if one.name.startswith(("kolors", "sdxl/inst")) else "buffalo_l"
        assert one.more == f"the face models {expected}"


@pytest.mark.parametrize(
    "spelling",
    [
        *("sd15/plus-face", "SD 1.5 plus face", "SD15_PLUS-FACE"),
        *("ip-adapter-plus-face_sd15.safetensors", "ip-adapter-plus-face_sd15"),
    ],
)
def test_names_are_found_in_any_spelling(spelling: str) -> None:
    assert downloads.find(spelling).name == "sd15/plus-face"


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(DownloadError, match=r"'sdxl/plusface2'.*sdxl/plus-face"):
        downloads.find("sdxl/plusface2")


def test_selection_by_family_and_purpose_brings_the_encoders() -> None:
    def names(*filters: str) -> list[str]:
        return [one.name for one in downloads.select(*filters)]

    assert names() == [one.name for one in DOWNLOADS]
    assert names("SD 1.5", "face") == ["sd15/plus-face", "encoder/vit-h"]
    assert names("kolors") == ["kolors/plus", "kolors/faceid-plus", "encoder/vit-l-336"]
    assert names("sdxl", "face portrait") == ["sdxl/portrait", "sdxl/portrait-unnorm"]
    assert names("kolors", "light") == []


def test_a_line_says_all_there_is_to_know() -> None:
    row = downloads.find("sd15/faceid-plusv2")
    start = "sd15/faceid-plusv2 (face identity): 157 MB, non-commercial. "
    needs = "Needs encoder/vit-h and the face models buffalo_l. "
    assert downloads.describe(row, {}) == f"{start}{needs}Not installed: {row.page}"
    assert downloads.describe(row, None) == f"{start}{needs}{row.page}"
    present = {row.name: Present("mine.bin")}
    assert downloads.describe(row, present) == f"{start}{needs}Installed as mine.bin."
    present = {row.name: Present("mine.bin", is_certain=False)}
    assert "Perhaps installed, as mine.bin" in downloads.describe(row, present)
    notes = downloads.notes([row])
    assert NON_COMMERCIAL in notes and "insightface/releases" in notes
    assert "IdentityNet" in downloads.notes([downloads.find("sdxl/instantid")])
    assert downloads.notes([downloads.find("sd15/base")]) == ""


# Fetching


CONTENT = {name: random.Random(name).randbytes(5000) for name in ("adapter", "encoder")}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub under huggingface_hub's default address, with small files under published names."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with serving() as running:
        address = running.endpoint
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        changed = []
        for one in DOWNLOADS:
            content = CONTENT["adapter" if one.purpose else "encoder"]
            running.files[f"{one.remote.repository}/{one.remote.path}"] = content
            known = (hashlib.sha256(content).hexdigest(),) if one.remote.sha256 else ()
            changed.append(replace(one, remote=replace(one.remote, sha256=known)))
        monkeypatch.setattr(downloads, "DOWNLOADS", tuple(changed))
        yield running


@pytest.fixture
def folders(tmp_path: Path) -> model_folders.ModelFolders:
    return model_folders.of_models(tmp_path / "models")


def request_of(name: str, **options: bool) -> obtain.Request:
    return obtain.Request(downloads.find(name), **options)


def fetched(folders: model_folders.ModelFolders) -> dict[str, bytes]:
    root = folders.adapters[0].parent
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


BASE = "ipadapter/ip-adapter_sd15.safetensors"
VIT_H = "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"


def test_an_adapter_brings_its_encoder(server: Hub, folders: model_folders.ModelFolders) -> None:
    done = obtain.obtain(request_of("sd15/base"), {}, folders)
    assert fetched(folders) == {BASE: CONTENT["adapter"], VIT_H: CONTENT["encoder"]}
    assert done.path == folders.adapters[0] / "ip-adapter_sd15.safetensors"
    assert done.name == "ip-adapter_sd15.safetensors"
    assert set(done.added) == {"sd15/base", "encoder/vit-h"}
    digest = hashlib.sha256(CONTENT["adapter"]).hexdigest()
    assert f"Its SHA-256 is the published one, {digest}." in done.text


@pytest.mark.parametrize("how", ["not wanted", "installed", "not read"])
def test_an_encoder_is_fetched_only_where_it_is_missing(
    server: Hub, folders: model_folders.ModelFolders, how: str
) -> None:
    installed = {"encoder/vit-h": Present("some name.safetensors")} if how == "installed" else {}
    if installed:
        adapters_folder = folders.encoders[0]
        adapters_folder.mkdir(parents=True)
        (adapters_folder / "some name.safetensors").write_bytes(b"")
    name = "sd15/faceid" if how == "not read" else "sd15/base"
    request = request_of(name, accept_licence=True, with_encoder=how != "not wanted")
    done = obtain.obtain(request, installed, folders)
    assert set(done.added) == {name}
    assert list(fetched(folders).values()).count(CONTENT["encoder"]) == 0
    assert ("encoder/vit-h is installed already, as some name" in done.text) == bool(installed)


def test_without_a_published_digest_the_words_say_whose_it_was(
    server: Hub, folders: model_folders.ModelFolders
) -> None:
    done = obtain.obtain(request_of("sd15/instruct", with_encoder=False), {}, folders)
    assert "is the one that the hub announces" in done.text


def test_an_unaccepted_licence_is_refused_before_anything(
    server: Hub, folders: model_folders.ModelFolders
) -> None:
    with pytest.raises(DownloadError) as caught:
        obtain.obtain(request_of("sd15/faceid-plusv2"), {}, folders)
    message = str(caught.value)
    assert NON_COMMERCIAL in message
    assert "https://huggingface.co/h94/IP-Adapter-FaceID/tree/main" in message
    assert "https://github.com/deepinsight/insightface#license" in message
    assert "accept_licence" in message and "--accept-licence" in message
    assert server.seen == []
    assert fetched(folders) == {}
    done = obtain.obtain(request_of("sd15/faceid-plusv2", accept_licence=True), {}, folders)
    assert "It also needs the face models buffalo_l" in done.text


def test_what_is_installed_needs_no_network_and_no_licence(
    server: Hub, folders: model_folders.ModelFolders
) -> None:
    folders.adapters[0].mkdir(parents=True)
    (folders.adapters[0] / "mine.bin").write_bytes(b"x")
    installed = {"sd15/faceid": Present("mine.bin")}
    done = obtain.obtain(request_of("sd15/faceid"), installed, folders)
    assert "sd15/faceid is installed already, as mine.bin. Nothing was downloaded." in done.text
    assert done.path == folders.adapters[0] / "mine.bin"
    assert not done.added
    assert server.seen == []


def test_a_guess_does_not_count_as_installed(
    server: Hub, folders: model_folders.ModelFolders
) -> None:
    installed = {"sd15/plus": Present("mine.safetensors", is_certain=False)}
    assert set(
        obtain.obtain(request_of("sd15/plus", with_encoder=False), installed, folders).added
    ) == {"sd15/plus"}


def test_another_file_of_that_name_is_not_overwritten(
    server: Hub, folders: model_folders.ModelFolders
) -> None:
    folders.encoders[0].mkdir(parents=True)
    (folders.encoders[0] / Path(VIT_H).name).write_bytes(b"half a file")
    with pytest.raises(DownloadError, match="exists and is not encoder/vit-h"):
        obtain.obtain(request_of("sd15/base"), {}, folders)
    assert server.seen == []
    assert fetched(folders) == {VIT_H: b"half a file"}


# Folders


def test_the_folders_of_a_comfyui_are_those_of_its_yaml_file(tmp_path: Path) -> None:
    own = tmp_path / "models"
    assert model_folders.of_comfyui(tmp_path) == model_folders.of_models(own)
    (tmp_path / "extra_model_paths.yaml").write_text(
        "other:\n  base_path: shelf\n  ipadapter: |\n    a\n    b\n  clip_vision: eyes\n"
        "first:\n  base_path: /elsewhere\n  is_default: true\n  clip_vision: ./c/../d\n"
        "empty:\nplain:\n  clip_vision: models/clip_vision\n  ipadapter: shelf/b\n"
    )
    found = model_folders.of_comfyui(tmp_path)
    shelf = tmp_path / "shelf"
    assert found.adapters == (shelf / "a", shelf / "b", own / "ipadapter")
    assert found.encoders == (Path("/elsewhere/d"), own / "clip_vision", shelf / "eyes")


def test_a_broken_yaml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "extra_model_paths.yaml").write_text("a: [")
    with pytest.raises(DownloadError, match=r"extra_model_paths.yaml cannot be read"):
        model_folders.of_comfyui(tmp_path)


def test_the_comfyui_is_the_one_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, named, around = (tmp_path / name for name in ("chosen", "named", "around"))
    for folder in (chosen, named, around):
        (folder / "models").mkdir(parents=True)
    pack = around / "custom_nodes" / "pack"
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert model_folders.find_comfyui(None, pack) == around
    assert model_folders.find_comfyui(None, tmp_path / "pack") is None
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert model_folders.find_comfyui(None, pack) == named
    assert model_folders.find_comfyui(chosen, pack) == chosen
    with pytest.raises(DownloadError, match="is not a ComfyUI"):
        model_folders.find_comfyui(tmp_path / "nowhere", pack)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    folders = model_folders.of_models(tmp_path)
    shelf = folders.adapters[0] / "sub"
    shelf.mkdir(parents=True)
    folders.encoders[0].mkdir()
    adapters.write_hollow(ROWS["sd15_vit-G"], shelf / "model (1).safetensors")
    adapters.write_hollow(ROWS["faceid_sd15"], shelf / "face.bin")
    adapters.write_hollow(ROWS["plus_sd15"], shelf / "model (2).safetensors")
    (shelf / "ip-adapter_sd15.safetensors").write_bytes(b"<html>a login page</html>")
    layout = layouts.clip_vision_h()
    tower = adapters.catalogue.hollow(layout)
    adapters.write_sparse(tower, folders.encoders[0] / "eye.safetensors")
    found = model_folders.installed(folders)
    assert found == {
        "sd15/base-vit-g": Present(str(Path("sub", "model (1).safetensors"))),
        "sd15/faceid": Present(str(Path("sub", "face.bin"))),
        "sd15/plus": Present(str(Path("sub", "model (2).safetensors")), is_certain=False),
        "encoder/vit-h": Present("eye.safetensors"),
    }


def test_a_published_file_is_known_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest decides between adapters with equal tensors; here that of a stand-in."""
    folders = model_folders.of_models(tmp_path)
    folders.adapters[0].mkdir(parents=True)
    legacy = folders.adapters[0] / "x.bin"
    adapters.write_hollow(ROWS["portrait_sd15"], legacy)
    digest = hashlib.sha256(legacy.read_bytes()).hexdigest()
    row = downloads.find("sd15/portrait-v11")
    known = replace(row, remote=Remote("a/b", "c.bin", (digest,)))
    monkeypatch.setattr(model_folders, "DOWNLOADS", (known,))
    assert model_folders.installed(folders) == {"sd15/portrait-v11": Present("x.bin")}


# The commands


def test_the_list_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ipadapter"
    folder.mkdir()
    adapters.write_hollow(ROWS["sd15_vit-G"], folder / "mine.safetensors")
    to = ["--to", str(tmp_path)]
    assert command.main(["models", *to]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(DOWNLOADS)]] == list(downloads.NAMES)
    assert lines[0].split() == ["name", "purpose", "size", "licence", "needs", "state"]
    column = lines[0].index("state")
    states = {line.split()[0]: line[column:] for line in lines[1 : 1 + len(DOWNLOADS)]}
    assert states.pop("sd15/base-vit-g") == "Installed as mine.safetensors."
    assert all(state.startswith("Not installed: https://hugg") for state in states.values())

    assert command.main(["models", "--installed", *to]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown if line] == ["name", "sd15/base-vit-g"]
    assert command.main(["models", "--family", "kolors", "--purpose", "light", *to]) == 0
    assert capsys.readouterr().out == "Nothing of that kind.\n"


def test_without_a_comfyui_the_list_says_so_and_nothing_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: Hub
) -> None:
    monkeypatch.setattr(model_folders, "find_comfyui", lambda chosen: None)
    assert command.main(["models", "--family", "sd15"]) == 0
    assert "What is installed is not known. No ComfyUI was found" in capsys.readouterr().out
    for arguments in (["models", "--installed"], ["download", "sd15/base"]):
        assert command.main(arguments) == 1
        assert "--to FOLDER" in capsys.readouterr().err
    assert server.seen == []


def test_the_command_downloads_into_the_folders_of_a_comfyui(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Hub
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "extra_model_paths.yaml").write_text("x:\n  ipadapter: shelf\n")
    arguments = ["download", "SD15/base", "sd15/light", "--comfyui", str(tmp_path)]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    shelf, eyes = tmp_path / "shelf", tmp_path / "models" / "clip_vision"
    assert sorted(path.name for path in shelf.iterdir()) == [
        "ip-adapter_sd15.safetensors",
        "ip-adapter_sd15_light.safetensors",
    ]
    assert [path.name for path in eyes.iterdir()] == [Path(VIT_H).name]
    assert out.count("encoder/vit-h: downloaded") == 1
    assert out.count("encoder/vit-h is installed already") == 1
    assert server.ranges == ["", "", ""]


def test_the_command_refuses_all_before_it_fetches_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Hub
) -> None:
    to = ["--to", str(tmp_path), "--without-encoder"]
    assert command.main(["download", "sd15/base", "sd15/faceid", *to]) == 1
    assert "its licence must be accepted first" in capsys.readouterr().err
    assert command.main(["download", "sd15/base", "sd15/nothing", *to]) == 1
    assert "no model called 'sd15/nothing'" in capsys.readouterr().err
    assert server.seen == []
    both = ["download", "sd15/base", "sd15/faceid", "--accept-licence", *to]
    assert command.main(both) == 0
    assert len(list((tmp_path / "ipadapter").iterdir())) == 2


def test_ctrl_c_keeps_what_has_arrived(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: Hub,
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.file_download.http_get", interrupted)
    assert command.main(["download", "sd15/base", "--to", str(tmp_path)]) == 130
    assert "run it again to get the rest" in capsys.readouterr().err


NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("a socket was opened")
socket.socket.__init__ = socket.getaddrinfo = refuse
import importlib, pkgutil, ip_adapter
for module in pkgutil.iter_modules(ip_adapter.__path__):
    if module.name not in ("host", "nodes", "legacy", "bench", "train", "evaluate"):
        importlib.import_module(f"ip_adapter.{module.name}")
from ip_adapter.__main__ import main
assert main(["models", "--to", sys.argv[1]]) == 0
assert main(["download", "sd15/faceid", "--to", sys.argv[1]]) == 1
assert "huggingface_hub" not in sys.modules
"""


def test_neither_import_nor_list_opens_a_socket(tmp_path: Path) -> None:
    code = [sys.executable, "-c", NO_NETWORK, str(tmp_path)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "licence must be accepted" in done.stderr
