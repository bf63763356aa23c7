"""Finding and fetching the host, the set-up stamp, the sheet; nothing here starts a ComfyUI."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from scripts import contact_sheet, host, pictures, prompts, setup
from scripts.client import PromptRejected

LOADERS = {
    "CheckpointLoaderSimple",
    "CLIPVisionLoader",
    "ControlNetLoader",
    "ImagePromptLoadAdapter",
}
"""Nodes of the host and ours that load a model by its name."""


def make_host(folder: Path, version: str = "0.30.0") -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def make_archive(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def no_chosen_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


def test_chosen_host_comes_before_the_one_around_the_pack_and_the_fetched_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = tmp_path / "around"
    repository = around / "custom_nodes" / "pack"
    assert host.find_host(repository) is None
    fetched = make_host(repository / ".host" / "ComfyUI")
    assert host.find_host(repository) == fetched
    make_host(around)
    assert host.find_host(repository) == around
    chosen = make_host(tmp_path / "chosen", "0.18.2")
    monkeypatch.setenv("COMFYUI_PATH", str(chosen))
    assert host.find_host(repository) == chosen
    assert host.host_version(chosen) == "0.18.2"


def test_folder_two_levels_up_counts_only_from_custom_nodes(tmp_path: Path) -> None:
    make_host(tmp_path)
    assert host.find_host(tmp_path / "projects" / "pack") is None


def test_chosen_folder_without_comfyui_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(host.HostError, match=r"COMFYUI_PATH is .* no main\.py"):
        host.find_host()


def test_wrong_digest_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(version: str, folder: Path, python: str | Path) -> Path:
        return make_archive(folder / "fake.tar.gz", {"x/vendor/ComfyUI/main.py": b""})

    monkeypatch.setattr(host, "_download", download)
    with pytest.raises(host.HostError, match="SHA-256"):
        host.install_host(repository=tmp_path)
    assert list((tmp_path / ".host").iterdir()) == []


def test_host_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    there = make_host(tmp_path / ".host" / "ComfyUI-0.18.2")
    assert host.install_host("2.0.0", repository=tmp_path, python="no-such-python") == there


def test_unknown_version_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(host.HostError, match=r"known: 2\.6\.0 \(ComfyUI 0\.30\.0\)"):
        host.install_host("9.9", repository=tmp_path)


def test_only_the_vendored_folder_is_unpacked(tmp_path: Path) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {
        "x/vendor/ComfyUI/main.py": b"main",
        "x/vendor/ComfyUI/comfy/sd.py": b"",
        "x/vendor/other.py": b"",
        "x/setup.py": b"",
    }
    target = tmp_path / "ComfyUI"
    host.unpack_host(make_archive(tmp_path / "a.tar.gz", members), target)
    files = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert files == {"main.py", "comfy/sd.py"}
    assert (target / "main.py").read_bytes() == b"main"


def symlink() -> tarfile.TarInfo:
    link = tarfile.TarInfo("x/vendor/ComfyUI/comfy")
    link.type = tarfile.SYMTYPE
    link.linkname = "/etc"
    return link


@pytest.mark.parametrize(
    "members",
    [
        {"x/vendor/ComfyUI/../../../evil.py": b""},
        {"/x/vendor/ComfyUI/evil.py": b""},
        {"link": symlink()},
        {"x/vendor/ComfyUI/main.py": b""},
    ],
    ids=["parent", "absolute", "symlink", "no comfy folder"],
)
def test_unsafe_or_incomplete_archive_is_refused(
    tmp_path: Path, members: dict[str, bytes | tarfile.TarInfo]
) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", members)
    with pytest.raises(host.HostError):
        host.unpack_host(archive, tmp_path / "deep" / "er" / "ComfyUI")
    assert not list(tmp_path.rglob("evil.py"))


def test_stamp_holds_until_an_input_changes(tmp_path: Path) -> None:
    comfyui, stamp = make_host(tmp_path / "ComfyUI"), tmp_path / "stamp"
    (tmp_path / "requirements.txt").write_text("einops\n")
    assert not setup.is_current(comfyui, repository=tmp_path, stamp=stamp)
    stamp.write_text(setup.stamp_text(comfyui, tmp_path))
    assert setup.is_current(comfyui, repository=tmp_path, stamp=stamp)
    elsewhere = make_host(tmp_path / "elsewhere")
    assert not setup.is_current(elsewhere, repository=tmp_path, stamp=stamp)
    for file in (comfyui / "requirements.txt", tmp_path / "pyproject.toml"):
        file.write_text("changed\n")
        assert not setup.is_current(comfyui, repository=tmp_path, stamp=stamp)
        stamp.write_text(setup.stamp_text(comfyui, tmp_path))


def test_torch_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.torch_requirements(tmp_path) == list(setup.TORCH_PINS)
    monkeypatch.setenv("COMFYUI_PATH", "somewhere")
    assert setup.torch_requirements(tmp_path) == []
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    (site / "torch-2.9.1+rocm6.4.dist-info").mkdir(parents=True)
    assert setup.torch_requirements(tmp_path) == ["torch==2.9.1+rocm6.4"]


def test_chosen_chromium_is_taken_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM_PATH", str(tmp_path / "missing"))
    assert setup.find_chromium() is None
    browser = tmp_path / "browser"
    browser.touch(mode=0o755)
    monkeypatch.setenv("CHROMIUM_PATH", str(browser))
    assert setup.find_chromium() == str(browser)


def test_rejection_quotes_the_host() -> None:
    details = {
        "error": {"message": "Prompt outputs failed validation"},
        "node_errors": {
            "7": {
                "class_type": "LoadImage",
                "errors": [{"message": "Value not in list", "details": "image: 'x.png'"}],
            }
        },
    }
    error = PromptRejected(details)
    assert "LoadImage (7): Value not in list: image: 'x.png'" in str(error)
    assert error.details is details


def test_pictures_are_the_same_each_time_and_written_once(tmp_path: Path) -> None:
    name, draw = next(iter(pictures.PICTURES.items()))
    pictures.write_pictures(tmp_path)
    with Image.open(tmp_path / name) as written:
        assert written.tobytes() == draw().tobytes()
    (tmp_path / name).write_bytes(b"the user's own")
    pictures.write_pictures(tmp_path)
    assert (tmp_path / name).read_bytes() == b"the user's own"


def test_sheet_grows_by_rows_and_fits_long_captions() -> None:
    def sheet(rows: int, columns: int, *figures: str) -> Image.Image:
        picture = Image.new("RGB", (64, 64), "#0c0")
        column = contact_sheet.Column("far too long for it " * 9, "n", [picture] * rows, figures)
        return contact_sheet.draw_sheet(
            "t", "s", [contact_sheet.Section("h", [column] * columns)], "f"
        )

    one = sheet(1, 3)
    assert sheet(2, 3).height - one.height == sheet(3, 3).height - sheet(2, 3).height > 3 * 64
    assert sheet(1, 4).width - one.width == sheet(1, 5).width - sheet(1, 4).width > 3 * 64
    assert sheet(1, 3, "a", "b").height > sheet(1, 3, "a").height > one.height
    # Every pixel of the pictures is there three times three, but for their round corners.
    green = dict((colour, count) for count, colour in one.getcolors(1 << 20))[(0, 204, 0)]
    assert 0.98 < green / (3 * 192 * 192) <= 1


def test_workflows_are_made_smaller_but_the_original_stays() -> None:
    workflow = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768}},
        "2": {"class_type": "KSampler", "inputs": {"steps": 25, "seed": 7}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
    }
    assert prompts.shrink(workflow, size=128, steps=6) == {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128}},
        "2": {"class_type": "KSampler", "inputs": {"steps": 6, "seed": 7}},
        "3": workflow["3"],
    }
    assert workflow["2"]["inputs"] == {"steps": 25, "seed": 7}


def test_every_workflow_has_its_api_twin() -> None:
    from scripts.graphs import GRAPHS

    assert prompts.names() == sorted(GRAPHS)
    assert all(prompts.read_prompt(name) for name in prompts.names())


def test_every_workflow_has_a_thumbnail_that_the_template_browser_can_show() -> None:
    from scripts.graphs import GRAPHS

    found = {path.stem: path for path in prompts.FOLDER.glob("*.jpg")}
    assert sorted(found) == sorted(GRAPHS)
    for path in found.values():
        with Image.open(path) as thumbnail:
            assert thumbnail.size == (512, 512) and thumbnail.format == "JPEG"
        assert path.stat().st_size < 60_000


def test_names_of_workflows_sort_as_they_are_meant() -> None:
    from scripts.graphs import GRAPHS

    assert list(GRAPHS) == sorted(GRAPHS)
    assert [int(name[:2]) for name in GRAPHS] == list(range(1, len(GRAPHS) + 1))


def test_every_model_of_a_workflow_can_be_downloaded_or_its_note_says_where_from() -> None:
    """The page offers these hosts and endings only; the name must be the one in the widget."""
    from scripts.graphs import GRAPHS

    offered = (".safetensors", ".sft", ".ckpt", ".pth", ".pt")
    for name in GRAPHS:
        nodes = prompts.read_workflow(name)["nodes"]
        (note,) = (node for node in nodes if node["type"] == "MarkdownNote")
        loaders = [node for node in nodes if node["type"] in LOADERS]
        assert loaders
        for node in loaders:
            (model,) = node["properties"]["models"]
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")
            if not model["name"].endswith(offered):
                page = model["url"].partition("/resolve/")[0]
                assert f"({page})" in note["widgets_values"][0]


def test_groups_hold_their_nodes_and_nothing_lies_on_anything() -> None:
    from scripts.graphs import GRAPHS

    for name in GRAPHS:
        workflow = prompts.read_workflow(name)
        boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
        frames = [group["bounding"] for group in workflow["groups"]]
        assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
        assert not [pair for pair in itertools.combinations(frames, 2) if overlap(*pair)]
        for node, box in zip(workflow["nodes"], boxes, strict=True):
            around = [frame for frame in frames if inside(box, frame)]
            assert len(around) == (node["type"] != "MarkdownNote"), (name, node["type"])


Box = Sequence[float]
"""Left, top, width, height."""


def overlap(one: Box, other: Box) -> bool:
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


def inside(box: Box, frame: Box) -> bool:
    return all(
        frame[axis] <= box[axis] and box[axis] + box[axis + 2] <= frame[axis] + frame[axis + 2]
        for axis in (0, 1)
    )
