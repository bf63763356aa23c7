"""The pages against the code: links and pictures, the catalogue, the words of the messages.

Commands are in test_docs_commands.py, the nodes' inputs in host/test_docs.py.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from ip_adapter.catalogue import APACHE, NON_COMMERCIAL, PUBLISHED, PURPOSES, UNKNOWN
from ip_adapter.encoders import ENCODERS
from scripts.prompts import names
from tests.conftest import ROOT
from tests.synthetic.catalogue import ROWS

DOCS = ROOT / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PICTURES = sorted((DOCS / "images").glob("*"))
GUIDES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
EVERYTHING = [*OTHERS, *GUIDES, *sorted(DOCS.rglob("*.md"))]
FACE_PAGES = ("LoadFaceModel", "DetectFace", "EncodeFace", "FaceLoRA", "AutoLoader")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]*)\)|<(https?:[^>\s]*)>")
CODE = re.compile(r"^ *```.*?^ *```|(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.MULTILINE | re.DOTALL)
LOCAL = "http://127.0.0.1:8188"


def page(name: str) -> str:
    return (DOCS / f"ImagePrompt{name}.md").read_text(encoding="utf-8")


def plain(text: str) -> str:
    """One line, for phrases that a line break may divide."""
    return " ".join(text.split())


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose heading row begins with this word."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    out = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        out.append([cell.strip() for cell in line.strip("|").split("|")])
    return out


def test_the_loader_lists_every_published_adapter_and_no_other() -> None:
    listed = []
    for family, variant, file, encoder, purpose, licence in rows(page("LoadAdapter"), "family"):
        name, link = re.fullmatch(r"\[(.+)\]\((.+)\)", file).groups()  # type: ignore[union-attr]
        is_research = licence == "research only"
        listed.append((family, variant.strip("`"), name, link, encoder, purpose, is_research))
    assert listed == [
        (
            row.family.name,
            row.variant,
            row.file,
            row.link,
            row.encoder.name if row.encoder else "none",
            row.purpose,
            row.licence == NON_COMMERCIAL,
        )
        for row in PUBLISHED
    ]


def test_the_automatic_loader_lists_every_purpose_of_every_family() -> None:
    families = ("SD 1.5", "SDXL", "Kolors")
    assert {row.family.name for row in PUBLISHED} == set(families)
    table = rows(page("AutoLoader"), "purpose")
    assert [cells[0] for cells in table] == list(PURPOSES)
    for purpose, _, *columns in table:
        for family, cell in zip(families, columns, strict=True):
            found = re.findall(r"`([^`]+)`", cell)
            assert found == [
                row.variant
                for row in PUBLISHED
                if (row.family.name, row.purpose) == (family, purpose)
            ]
            assert found or cell == "none"


def test_the_encoder_page_names_what_adapters_need_and_where_it_is() -> None:
    listed = {cells[0]: cells[2] for cells in rows(page("LoadEncoder"), "image encoder")}
    needed = {row.encoder for row in PUBLISHED if row.encoder}
    assert set(listed) == {encoder.name for encoder in needed} | {"none"}
    for encoder in needed:
        assert encoder in ENCODERS and f"({encoder.link})" in listed[encoder.name]


@pytest.mark.parametrize("name", FACE_PAGES)
def test_face_pages_state_the_terms_the_alternative_and_the_installation(name: str) -> None:
    text = plain(page(name))
    assert "FaceID, portrait and InstantID adapters that were trained with them, are for" in text
    assert "for non-commercial research only" in text
    assert "`plus-face` (SD 1.5, SDXL) or `full-face` (SD 1.5): they are Apache-2.0" in text
    assert "python -m pip install onnxruntime" in text
    assert "with the Python that runs ComfyUI" in text


def test_the_alternative_is_as_free_as_the_pages_say() -> None:
    for variant, families in (("plus-face", {"SD 1.5", "SDXL"}), ("full-face", {"SD 1.5"})):
        found = [row for row in PUBLISHED if row.variant == variant]
        assert {row.family.name for row in found} == families
        assert {row.licence for row in found} == {"Apache-2.0"}


def links(path: Path) -> list[tuple[str, str, str]]:
    """``!`` for pictures, the words, and where it leads, for every link of a page."""
    prose = CODE.sub("", path.read_text(encoding="utf-8"))
    found = LINK.findall(prose)
    return [(mark, words, target or address) for mark, words, target, address in found]


def place(path: Path, target: str) -> Path:
    """The file that a relative link leads to; the host shows translated pages from web/docs."""
    folder = DOCS if DOCS in path.parents else path.parent
    return folder / target.partition("#")[0] if target.partition("#")[0] else path


@cache
def anchors(path: Path) -> frozenset[str]:
    """What headings are called in links, as GitHub does it."""
    prose = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+?) *$", prose, re.MULTILINE):
        plain_words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain_words.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return frozenset(found)


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for mark, words, target in links(path):
        assert words or not mark or target, "a picture without words for those who cannot see it"
        if "://" in target:
            parts = urlsplit(target)
            assert target == LOCAL or (parts.scheme == "https" and "." in parts.netloc), target
            assert re.fullmatch(r"[\w\-./:#?=&%~+@]+", target), target
            continue
        there = place(path, target)
        assert there.exists(), target
        assert ROOT in there.resolve().parents, target
        if "#" in target:
            assert target.partition("#")[2] in anchors(there), target
        if mark:
            with Image.open(there) as picture:
                assert words and picture.width >= 64


def test_slugs_are_github_s() -> None:
    """Of pages on github.com: their headings, and the links that it makes."""
    page = "# What's new in 2.0?\n## C++ & C\n## C & C\n## `a_b`: *c*\n## One\n## One\n"
    slugs = ["whats-new-in-20", "c--c", "c--c-1", "a_b-c", "one", "one-1"]
    path = Path("unused.md")

    class Page:
        """Read as a path is."""

        def read_text(self, encoding: str) -> str:
            return page

    assert path.suffix == ".md" and anchors.__wrapped__(Page()) == set(slugs)


def test_every_picture_is_shown_somewhere() -> None:
    shown = {
        place(path, to).resolve() for path in EVERYTHING for mark, _, to in links(path) if mark
    }
    folders = [ROOT / "docs" / "images", DOCS / "images"]
    kept = {file for folder in folders for file in folder.glob("*.*")}
    assert {file for file in kept if file.suffix in (".png", ".jpg", ".webp")} == kept
    assert not kept - shown


def test_templates_that_pages_name_are_there() -> None:
    shipped = set(names())
    for path in [ROOT / "README.md", *GUIDES]:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"`(?:workflows/(?:api/)?)?(\d\d_\w+)(?:\.json)?`", text))
        assert named <= shipped, path.name
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for section in recipes.split("\n## ")[1:-1]:
        assert re.search(r"^(Templates?: .*`\d\d_|Nodes: )", section, re.MULTILINE)


def test_the_workflow_of_the_first_steps_is_the_first_template() -> None:
    from scripts.doc_pictures import FIRST_PICTURE, first_picture

    kept = json.loads(FIRST_PICTURE.read_text(encoding="utf-8"))
    assert kept == first_picture()  # or: python -m scripts.doc_pictures strength
    values = {node["type"]: node["widgets_values"] for node in kept["nodes"]}
    assert (ROOT / "miniature/models/ipadapter" / values["ImagePromptLoadAdapter"][0]).is_file()
    assert (ROOT / "miniature/models/checkpoints" / values["CheckpointLoaderSimple"][0]).is_file()
    assert (ROOT / "miniature/models/clip_vision" / values["CLIPVisionLoader"][0]).is_file()
    assert values["EmptyLatentImage"] == [64, 64, 1]
    assert not any("models" in node["properties"] for node in kept["nodes"])


def display_names() -> set[str]:
    """What the nodes of this pack are called in the menu."""
    return {path.read_text(encoding="utf-8").splitlines()[0][2:] for path in PAGES}


@pytest.mark.parametrize("name", ["recipes", "first_steps", "choosing", "api", "troubleshooting"])
def test_nodes_that_pages_name_are_there(name: str) -> None:
    """Bold words that begin as a node's name do are one."""
    text = plain((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    known = display_names()
    verbs = {each.split()[0] for each in known}
    bold = {words for words in re.findall(r"\*\*(.+?)\*\*", text) if words.split()[0] in verbs}
    assert bold and bold <= known


def test_the_table_for_choosing_has_every_adapter_with_its_size() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    bytes_of = {
        (row.family, row.file): row.bytes or row.parameters * row.dtype.itemsize
        for row in ROWS.values()
    }
    terms = {APACHE: "Apache-2.0", NON_COMMERCIAL: "research only", UNKNOWN: "see its page"}
    assert rows(text, "family") == [
        [
            row.family.name,
            f"`{row.variant}`",
            f"[{row.file}]({row.link})",
            str(round(bytes_of[row.family.name, row.file] / 1e6)),
            row.encoder.name if row.encoder else "none",
            terms[row.licence],
        ]
        for row in PUBLISHED
    ]
    table = rows(text, "you want")
    assert [cells[1] for cells in table] == list(PURPOSES)
    for _, purpose, *columns in table:
        for family, cell in zip(("SD 1.5", "SDXL", "Kolors"), columns, strict=True):
            fitting = [r for r in PUBLISHED if (r.family.name, r.purpose) == (family, purpose)]
            assert re.findall(r"`([^`]+)`", cell) == [r.variant for r in fitting]
            assert fitting or cell == "none"
    for name, _, link in rows(text, "image encoder"):
        (encoder,) = (one for one in ENCODERS if one.name == name)
        assert f"]({encoder.link})" in link


@cache
def sentences() -> str:
    """Every text in the library, a line each; what is filled in is a zero byte."""
    found = []
    for path in sorted((ROOT / "ip_adapter").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [plain(_text(node)) for node in ast.walk(tree)]
    return "\n".join(filter(None, found))


def _text(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str() as value):
            return re.sub(r"%[-.\d]*[sdgf]", "\0", value).replace("%%", "%")
        case ast.JoinedStr(values=values):
            return "".join(_text(v) if isinstance(v, ast.Constant) else "\0" for v in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
    return ""


def quoted(section: str) -> list[str]:
    """The texts in the first cells of a section's table."""
    first = re.findall(r"^\| (`.*?) \| ", section, re.MULTILINE)
    return [text for cell in first for text in re.findall(r"`(.+?)`", cell)]


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    """Three dots stand for something that the code fills in; the rest is its very words."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = page.split("\n## ")[3:]  # complaints and the host's own messages come before
    messages = [text for section in sections for text in quoted(section)]
    assert len(set(messages)) >= 60
    for message in messages:
        words = r"[^\n]*?\0[^\n]*?".join(map(re.escape, message.split("...")))
        assert re.search(words, sentences()), message


def test_names_that_are_explained_are_those_of_the_code() -> None:
    """``file.name`` and ``file.Class.name`` of the library."""
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    checked = 0
    for words in re.findall(r"`([a-z_.]+(?:\.\w+)+)`", text):
        parts = words.split(".")
        end = next((n for n in (2, 1) if _file(parts[:n]).is_file()), 0)
        assert end, words
        if parts[end:] == ["py"]:
            continue
        scope: list[ast.stmt] = ast.parse(_file(parts[:end]).read_text(encoding="utf-8")).body
        for name in parts[end:]:
            (scope,) = (_body(each) for each in scope if name in _names(each))
            checked += 1
    assert checked >= 20


def _file(parts: list[str]) -> Path:
    return (ROOT / "ip_adapter").joinpath(*parts).with_suffix(".py")


def _body(statement: ast.stmt) -> list[ast.stmt]:
    return list(getattr(statement, "body", []))


def _names(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_are_short_and_whole(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and 15 <= len(lines) <= 80
    assert all(len(line) <= 110 for line in lines if not line.startswith("|"))
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    for before, width in pairwise(widths):
        assert 0 in (before, width) or before == width, "a table row of another width"


def test_every_page_shows_its_node_and_no_picture_is_left_over() -> None:
    assert [picture.name for picture in PICTURES] == [f"{path.stem}.png" for path in PAGES]
    for path in PAGES:
        title, *lines = path.read_text(encoding="utf-8").splitlines()
        shown = [line for line in lines if line.startswith("![")]
        assert shown == [f"![{title[2:]}](images/{path.stem}.png)"]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_pictures_of_nodes_are_small(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.mode == "P" and 400 <= picture.width <= 1000
    assert path.stat().st_size <= 25_000
