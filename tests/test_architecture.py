"""Rules about the package itself: who imports whom, what it exports, what it never does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import tomllib

import ip_adapter
from tests.conftest import ROOT

LIBRARY = ROOT / "ip_adapter"
ROOMS = [
    {"encoders", "errors", "files", "layers", "refusals"},
    {"catalogue", "drawing", "images", "lora", "masks", "names", "spec"},
    {"attention", "embeds", "enhance", "faces", "presets", "projections", "prompt", "references"},
    {"grid", "maps", "retouch", "strategies", "tiles"},
    {"adapter", "detection", "face_models", "heatmap", "influence", "openclip"},
    {"objective"},
    {"regions", "summary"},
    {"checkpoint", "diagram"},
    {"convert", "hub"},
    {"downloads"},
    {"model_folders", "obtain"},
    {"__main__"},
]
"""A file imports from rows above its own only; then come `host`, the activities `train` and
`evaluate`, `bench`, and at last `nodes` and `legacy`."""

FILES = sorted(LIBRARY.glob("*.py"))
HOST_FILES = sorted((LIBRARY / "host").glob("*.py"))
ACTIVITY_FILES = sorted([*(LIBRARY / "train").glob("*.py"), *(LIBRARY / "evaluate").glob("*.py")])
BENCH_FILES = sorted((LIBRARY / "bench").glob("*.py"))
NODE_FILES = sorted([*(LIBRARY / "nodes").glob("*.py"), *(LIBRARY / "legacy").glob("*.py")])
MINIATURE = ROOT / "miniature"
MINIATURE_FILES = sorted(MINIATURE.glob("*.py"))
PACK_FILES = sorted([*LIBRARY.rglob("*.py"), ROOT / "nodes.py", ROOT / "__init__.py"])


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file as (level of relativity, module)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                yield from ((node.level, name.name) for name in node.names)
            else:
                yield node.level, node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_library_imports_downwards_and_never_the_host(path: Path) -> None:
    row_of = {name: row for row, names in enumerate(ROOMS) for name in names}
    for level, module in imports(path):
        top = module.split(".")[0]
        assert not top.startswith(("comfy", "folder_paths", "server", "nodes", "ip_adapter"))
        if level and path.stem != "__init__":
            assert row_of[top] < row_of[path.stem], f"{path.stem} imports {top}"


@pytest.mark.parametrize("path", HOST_FILES, ids=lambda path: path.stem)
def test_the_host_room_does_not_know_the_nodes(path: Path) -> None:
    above = {"nodes", "legacy", "train", "evaluate", "bench"}
    assert not any(above & set(module.split(".")) for _, module in imports(path))


@pytest.mark.parametrize("path", ACTIVITY_FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_activities_do_not_know_the_nodes_nor_one_another(path: Path) -> None:
    above = {"nodes", "legacy", "train", "evaluate", "bench"}
    assert not any(above & set(module.split(".")) for _, module in imports(path))


@pytest.mark.parametrize("path", BENCH_FILES, ids=lambda path: path.stem)
def test_the_bench_knows_all_but_the_nodes(path: Path) -> None:
    above = {"nodes", "legacy", "evaluate"}
    assert not any(above & set(module.split(".")) for level, module in imports(path) if level)


def test_every_library_file_has_its_row() -> None:
    assert {path.stem for path in FILES} - {"__init__"} == set().union(*ROOMS)


@pytest.mark.parametrize(
    "path",
    [*FILES, *HOST_FILES, *ACTIVITY_FILES, *BENCH_FILES, *NODE_FILES, ROOT / "nodes.py"],
    ids=str,
)
def test_files_are_short_documented_and_quiet(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "no module docstring"
    assert len(source.splitlines()) <= 450
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
    if path.parent == LIBRARY:
        assert not re.search(r"no_grad|inference_mode|\.cuda\(", source)


def outside(path: Path) -> set[str]:
    """Top names of what a file of the miniature imports from elsewhere, anywhere in it."""
    return {module.split(".")[0] for level, module in imports(path) if not level}


@pytest.mark.parametrize("path", PACK_FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_the_pack_does_not_know_the_miniature(path: Path) -> None:
    """It is a model like others; `layers` and `encoders` list what they must, in their words."""
    assert not any("miniature" in module.split(".") for _, module in imports(path))


@pytest.mark.parametrize("path", MINIATURE_FILES, ids=lambda path: f"miniature.{path.stem}")
def test_the_miniature_uses_the_pack_but_for_its_nodes(path: Path) -> None:
    """Relatively its own files only, for the host loads the folder under another name."""
    own = {file.stem for file in MINIATURE_FILES}
    for level, module in imports(path):
        assert not {"nodes", "legacy"} & set(module.split(".")), module
        assert level <= 1 and (not level or module.split(".")[0] in own), module
    assert not outside(path) & {"miniature", "tests", "scripts", "nodes", "diffusers"}


@pytest.mark.parametrize("name", ["family", "progress", "reader", "words", "world"])
def test_the_world_of_the_miniature_stands_alone(name: str) -> None:
    assert not outside(MINIATURE / f"{name}.py") & {"ip_adapter", "comfy", "folder_paths"}


def test_the_miniature_as_a_pack_needs_no_other_pack() -> None:
    """The host may load it before this pack, or without it."""
    seen, todo = set[str](), ["__init__"]
    while todo:
        seen.add(name := todo.pop())
        found = list(imports(MINIATURE / f"{name}.py"))
        todo += [module for level, module in found if level and module not in seen]
    assert {"pack", "host", "family", "words", "world"} <= seen
    assert not any("ip_adapter" in outside(MINIATURE / f"{name}.py") for name in seen)


def test_the_miniature_imports_in_no_circle() -> None:
    """But for types: those are imported for the checker alone."""
    graph: dict[str, set[str]] = {}
    for path in MINIATURE_FILES:
        source = re.sub(r"\nif TYPE_CHECKING:\n(    .*\n)+", "\n", path.read_text())
        graph[path.stem] = {
            name.name.split(".")[0] if node.module is None else node.module.split(".")[0]
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.level
            for name in node.names
        }
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("path", MINIATURE_FILES, ids=lambda path: f"miniature.{path.stem}")
def test_the_miniature_s_files_are_short_and_documented(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert len(source.splitlines()) <= 450


def test_importing_the_pack_imports_nothing_heavy() -> None:
    loaded = {module for _, module in imports(ROOT / "__init__.py") if module != "nodes"}
    assert loaded == {"__future__", "typing"}


def test_public_names_are_sorted_and_exist() -> None:
    assert list(ip_adapter.__all__) == sorted(ip_adapter.__all__)
    assert all(hasattr(ip_adapter, name) for name in ip_adapter.__all__)


def test_errors_are_named_by_where_they_are_exported() -> None:
    for name in ip_adapter.__all__:
        value = getattr(ip_adapter, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert value.__module__ == "ip_adapter"


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ip_adapter.__version__
    assert f"## [{ip_adapter.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_and_project_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = sorted(line for line in lines if line and not line.startswith("#"))
    assert listed == sorted(project["dependencies"])
