"""Help pages cut into blocks, for comparing two languages of one page."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

CODE = re.compile(r"`[^`]+`")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)]*)\)")
MARK = re.compile(r"(\*{1,2})(?=\S)(.+?)(?<=\S)\1")


@dataclass(frozen=True)
class Block:
    """One heading, paragraph, list item, table row or code block.

    Attributes:
        kind: What it is: heading, paragraph, item, code, or of a table head, rule or row.
        text: Its text, on one line unless it is code.
        lines: How many lines it takes in the file.
        table: Of a row, the first cell of its table's head.
    """

    kind: str
    text: str
    lines: int = 1
    table: str = ""

    @property
    def cells(self) -> list[str]:
        """The cells of a table row."""
        return [cell.strip() for cell in re.split(r"(?<!\\)\|", self.text.strip()[1:-1])]

    @property
    def form(self) -> tuple[str, int]:
        """What another language has in common: kind, and level, number or number of cells."""
        if self.kind == "heading":
            return self.kind, len(self.text.split()[0])
        if self.kind in ("head", "rule", "row"):
            return self.kind, len(self.cells)
        if self.kind == "item" and (number := re.match(r"(\d+)\.", self.text)):
            return self.kind, int(number[1])
        return self.kind, 0

    @property
    def code(self) -> list[str]:
        """What is in backticks."""
        return [] if self.kind == "code" else CODE.findall(self.text)

    @property
    def links(self) -> list[tuple[str, str]]:
        """Pictures and links: whether it is a picture, and where it leads."""
        return [] if self.kind == "code" else [(one[1], one[3]) for one in LINK.finditer(self.text)]

    @property
    def _marks(self) -> list[re.Match[str]]:
        return [] if self.kind == "code" else list(MARK.finditer(CODE.sub("`", self.text)))

    @property
    def bold(self) -> list[str]:
        """Names in bold."""
        return [one[2] for one in self._marks if one[1] == "**"]

    @property
    def italics(self) -> list[str]:
        """Names in italics."""
        return [one[2] for one in self._marks if one[1] == "*"]

    @property
    def prose(self) -> str:
        """What is left for translation: no code, no links, no names of nodes."""
        if self.kind == "code":
            return ""
        text = LINK.sub(" ", CODE.sub(" ", self.text))
        return re.sub(r"\*\*.+?\*\*", " ", text)

    @property
    def unclosed(self) -> bool:
        """Whether a mark would show as asterisks: CommonMark's rule of flanking delimiters."""
        text = CODE.sub("`", self.text)
        for one in self._marks:
            before = text[one.start() - 1] if one.start() else " "
            after = text[one.end()] if one.end() < len(text) else " "
            if is_punctuation(one[2][0]) and not (before.isspace() or is_punctuation(before)):
                return True
            if is_punctuation(one[2][-1]) and not (after.isspace() or is_punctuation(after)):
                return True
        rest = MARK.sub("", text) if self.kind != "code" else ""
        return "**" in rest


def is_punctuation(letter: str) -> bool:
    """Whether Markdown takes a letter for punctuation."""
    return unicodedata.category(letter)[0] in "PS"


def blocks(text: str) -> list[Block]:
    """Cut a page into blocks."""
    found: list[Block] = []
    code: list[str] | None = None
    table = ""
    goes_on = False  # whether the next line may belong to the last block
    for line in text.splitlines():
        if line.startswith("```"):
            if code is not None:
                found.append(Block("code", "\n".join(code), len(code)))
            code, goes_on = ([] if code is None else None), False
        elif code is not None:
            code.append(line)
        elif line.startswith("|"):
            found.append(_row(line, table))
            table, goes_on = table or found[-1].cells[0], False
        elif goes_on and line.strip() and not _starts(line):
            last = found[-1]
            found[-1] = Block(last.kind, f"{last.text} {line.strip()}", last.lines + 1)
        elif line.strip():
            found.append(Block(_starts(line) or "paragraph", line))
            goes_on = found[-1].kind != "heading"
        else:
            table, goes_on = "", False
    return found


def _row(line: str, table: str) -> Block:
    if not table:
        return Block("head", line)
    return Block("rule", line) if set(line) <= set("|-: ") else Block("row", line, table=table)


def _starts(line: str) -> str:
    """The kind of block that a line begins by its first letters, if any."""
    if line.startswith("#"):
        return "heading"
    return "item" if re.match(r"(- |\d+\. )", line) else ""
