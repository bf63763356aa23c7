"""The translations against the schemas and the English pages: all there, and saying the same."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from typing import Any

import pytest

from scripts.locales import (
    LANGUAGES,
    LOCALES,
    PAGES,
    SOURCES,
    english,
    flat,
    read,
    stale,
    texts_file,
)
from tests.host.help_pages import Block, blocks

pytestmark = pytest.mark.host

IDS = sorted(path.stem for path in PAGES.glob("*.md"))
LETTERS = {"zh": r"[\u4e00-\u9fff]", "ko": r"[\uac00-\ud7a3]", "ja": r"[\u3040-\u30ff]"}
"""Letters that a sentence of the language has: Han, Hangul, kana."""
FOREIGN = {
    "zh": r"[\u3040-\u30ff\uac00-\ud7a3]",
    "ko": r"[\u3040-\u30ff\u4e00-\u9fff]",
    "ja": r"[\uac00-\ud7a3]",
}
"""Letters that it has not."""
HEADS = {
    "zh": ["输入", "<nobr>这个输入的含义</nobr>", "<nobr>可用的取值</nobr>"],
    "ko": ["입력", "<nobr>이 입력의 의미</nobr>", "<nobr>쓸 수 있는 값</nobr>"],
    "ja": ["入力", "<nobr>この入力の意味</nobr>", "<nobr>使える値</nobr>"],
}
"""Of the tables of inputs. Unbroken, for a column of such letters may shrink to one letter."""
NUMBER = r"(?<![\w.-])-?\d+(?:\.\d+)?(?![\w.]*\w)"
SYNTAX = set("{}@|")
"""What the front end's message compiler reads as more than text."""


@pytest.fixture(scope="module")
def schemas(host: Any) -> dict[str, Any]:
    found = [cls.define_schema() for cls in host.library("nodes").NODES]
    return {schema.node_id: schema for schema in found}


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def texts(language: str) -> dict[str, Any]:
    return read(texts_file(language))


def wanted(schemas: dict[str, Any]) -> dict[str, str]:
    """Every English text of every node under the path at which the front end looks for it."""
    found = {}
    for node, schema in schemas.items():
        found[f"{node}.display_name"] = schema.display_name
        found[f"{node}.description"] = schema.description
        for one in schema.inputs:
            found[f"{node}.inputs.{one.id}.name"] = one.id
            found[f"{node}.inputs.{one.id}.tooltip"] = one.tooltip
        for index, one in enumerate(schema.outputs):
            found[f"{node}.outputs.{index}.name"] = one.display_name
            found[f"{node}.outputs.{index}.tooltip"] = one.tooltip
    return found


def is_sentence(path: str) -> bool:
    return path.endswith((".tooltip", ".description"))


def without_examples(text: str) -> str:
    """The text without its example in braces, which the front end could not show."""
    return re.sub(r"\{.*\}", "", text)


def options(schema: Any) -> dict[str, list[str]]:
    """The choices of each input that has some."""
    return {one.id: list(getattr(one, "options", None) or []) for one in schema.inputs}


def named(words: list[str], text: str) -> set[str]:
    """Which of these words the text has, each as a word of its own."""
    return {word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.A)}


def test_english_is_what_the_schema_says(schemas: dict[str, Any], host: Any) -> None:
    derived = {node: english(host.node(node).GET_NODE_INFO_V1()) for node in schemas}
    assert flat(derived) == wanted(schemas)


def test_languages_are_those_of_the_issue_and_folders_hold_nothing_else() -> None:
    found = sorted(str(path.relative_to(LOCALES)) for path in LOCALES.rglob("*"))
    files = [f"{language}/nodeDefs.json" for language in LANGUAGES]
    assert found == sorted([*LANGUAGES, *files, SOURCES.name])


def test_every_text_is_there_and_none_is_left_over(
    texts: dict[str, Any], schemas: dict[str, Any]
) -> None:
    found, needed = flat(texts), wanted(schemas)
    assert sorted(found.keys() - needed.keys()) == []
    assert sorted(needed.keys() - found.keys()) == []
    assert [path for path, text in found.items() if text != text.strip() or not text] == []


def test_texts_are_in_the_language(
    texts: dict[str, Any], schemas: dict[str, Any], language: str
) -> None:
    found = flat(texts)
    for path, text in wanted(schemas).items():
        assert found[path] != text or not is_sentence(path), path
        if is_sentence(path):
            assert re.search(LETTERS[language], found[path]), path
        assert not re.search(FOREIGN[language], found[path]), path


def test_the_front_end_can_read_the_texts(texts: dict[str, Any]) -> None:
    assert {path: text for path, text in flat(texts).items() if set(text) & SYNTAX} == {}


def test_texts_keep_numbers_and_choices(texts: dict[str, Any], schemas: dict[str, Any]) -> None:
    found = flat(texts)
    for path, text in wanted(schemas).items():
        missing = Counter(re.findall(NUMBER, without_examples(text)))
        missing -= Counter(re.findall(NUMBER, found[path], re.A))
        assert not missing, (path, missing)
    for node, schema in schemas.items():
        for one in schema.inputs:
            choices = options(schema)[one.id]
            translated = found[f"{node}.inputs.{one.id}.tooltip"]
            assert named(choices, one.tooltip) <= named(choices, translated), (node, one.id)


def test_names_are_consistent(texts: dict[str, Any], schemas: dict[str, Any]) -> None:
    found = flat(texts)
    titles = Counter(found[f"{node}.display_name"] for node in schemas)
    assert {title: count for title, count in titles.items() if count > 1} == {}
    assert [title for title in titles if unicodedata.category(title[-1])[0] == "P"] == []
    names: dict[tuple[str, str], set[str]] = defaultdict(set)
    for node, schema in schemas.items():
        for one in schema.inputs:
            names[one.id, one.io_type].add(found[f"{node}.inputs.{one.id}.name"])
        for index, one in enumerate(schema.outputs):
            names[one.display_name, one.io_type].add(found[f"{node}.outputs.{index}.name"])
    assert {what: several for what, several in names.items() if len(several) > 1} == {}


def test_every_page_is_translated_and_none_is_left_over(schemas: dict[str, Any]) -> None:
    folders = sorted(path.name for path in PAGES.iterdir() if path.is_dir())
    assert folders == sorted([*schemas, "images"])
    for node in schemas:
        found = sorted(path.name for path in (PAGES / node).iterdir())
        assert found == sorted(f"{language}.md" for language in LANGUAGES)


@pytest.fixture(params=IDS)
def pair(request: pytest.FixtureRequest, language: str) -> tuple[list[Block], list[Block]]:
    """The blocks of a page in English and in another language."""
    node = request.param
    original = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    translated = (PAGES / node / f"{language}.md").read_text(encoding="utf-8")
    return blocks(original), blocks(translated)


def test_pages_have_the_same_form(pair: tuple[list[Block], list[Block]]) -> None:
    original, translated = pair
    assert [block.form for block in translated] == [block.form for block in original]


def test_pages_keep_what_is_not_translated(
    pair: tuple[list[Block], list[Block]], texts: dict[str, Any], schemas: dict[str, Any]
) -> None:
    titles = {schema.display_name: texts[node]["display_name"] for node, schema in schemas.items()}
    for english_block, block in zip(*pair, strict=True):
        assert Counter(block.code) == Counter(english_block.code), block.text
        assert block.links == english_block.links, block.text
        assert Counter(block.bold) == Counter(titles[name] for name in english_block.bold)
        assert len(block.italics) == len(english_block.italics), block.text
        missing = Counter(re.findall(NUMBER, english_block.prose))
        missing -= Counter(re.findall(NUMBER, block.prose, re.A))
        assert not missing, (block.text, missing)
        if block.kind == "code":
            assert block.text == english_block.text


def test_pages_are_in_the_language(pair: tuple[list[Block], list[Block]], language: str) -> None:
    for english_block, block in zip(*pair, strict=True):
        assert not re.search(FOREIGN[language], block.text), block.text
        if block.kind != "code" and len(re.findall(r"[a-z]{2,}", english_block.prose)) >= 5:
            assert re.search(LETTERS[language], block.prose), block.text
        if language != "ko" and block.kind in ("paragraph", "item"):
            assert block.lines == 1, f"a line break shows as a space: {block.text}"


def test_marked_names_show_as_marked(pair: tuple[list[Block], list[Block]]) -> None:
    assert [block.text for block in pair[1] if block.unclosed] == []


@pytest.mark.parametrize("node", IDS)
def test_tables_show_the_names_of_the_front_end(
    node: str, language: str, texts: dict[str, Any], schemas: dict[str, Any]
) -> None:
    page = blocks((PAGES / node / f"{language}.md").read_text(encoding="utf-8"))
    original = blocks((PAGES / f"{node}.md").read_text(encoding="utf-8"))
    assert page[0].text == f"# {texts[node]['display_name']}"
    schema, names = schemas[node], texts[node]
    wanted_cells = [f"`{one.id}` {names['inputs'][one.id]['name']}" for one in schema.inputs]
    wanted_cells += [
        f"`{one.display_name}` {names['outputs'][str(index)]['name']}"
        for index, one in enumerate(schema.outputs)
    ]
    starts = [f"`{one.id}`" for one in schema.inputs]
    starts += [f"`{one.display_name}`" for one in schema.outputs]
    rows = [
        (before.cells, after.cells)
        for before, after in zip(original, page, strict=True)
        if before.kind == "row" and before.table in ("input", "output")
    ]
    assert [before[0] for before, _ in rows] == starts
    assert [after[0] for _, after in rows] == wanted_cells
    for one, (before, after) in zip(schema.inputs, rows, strict=False):
        choices = options(schema)[one.id]
        assert named(choices, before[-1]) <= named(choices, after[-1]), after
    heads = [
        after.cells
        for before, after in zip(original, page, strict=True)
        if before.kind == "head" and before.cells[0] == "input"
    ]
    assert heads == [HEADS[language]]
    every = [choice for choices in options(schema).values() for choice in choices]
    for block, translated in zip(original, page, strict=True):
        if block.kind == "row" and block.table in ("preset", "mode", "purpose"):
            assert named(every, block.cells[0]) <= named(every, translated.cells[0])
        if block.kind == "item" and block.text[2:].split()[0] in every:
            assert named(every, block.text[2:].split()[0]) <= named(every, translated.text)


def test_translations_are_of_the_present_english(language: str, host: Any, schemas: Any) -> None:
    nodes = {node: english(host.node(node).GET_NODE_INFO_V1()) for node in schemas}
    assert stale(language, nodes) == [], "translate what changed, then scripts.locales seal"
