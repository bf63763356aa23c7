"""The help pages against the catalogue: every published adapter, its terms, no dead link."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from ip_adapter.catalogue import NON_COMMERCIAL, PUBLISHED, PURPOSES
from ip_adapter.encoders import ENCODERS
from tests.conftest import ROOT

DOCS = ROOT / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GUIDES = sorted((ROOT / "docs").glob("*.md"))
FACE_PAGES = ("LoadFaceModel", "DetectFace", "EncodeFace", "FaceLoRA", "AutoLoader")
LINK = re.compile(r"\[[^\]]*\]\(([^)]*)\)")


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


@pytest.mark.parametrize("path", [*PAGES, *GUIDES], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert (path.parent / link.split("#")[0]).is_file(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_are_short_and_whole(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and 15 <= len(lines) <= 80
    assert all(len(line) <= 110 for line in lines if not line.startswith("|"))
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    for before, width in pairwise(widths):
        assert 0 in (before, width) or before == width, "a table row of another width"
