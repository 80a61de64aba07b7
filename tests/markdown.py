"""Code blocks, commands in the running text and links of the Markdown pages of this repository."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file.
        line: of the first line of `text` in it, from 1.
        language: the word behind the fence, in full.
        text: without the fences.
    """

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order; `text` instead of what the file holds.

    Raises:
        ValueError: where a fence is not closed.
    """
    found: list[Block] = []
    fence, indent, language, first, lines = "", 0, "", 0, list[str]()
    for number, line in enumerate((page.read_text(encoding="utf-8") if text is None else text).splitlines(), 1):
        match = _FENCE.match(line)
        if not fence:
            if match:
                fence, indent, language, first = match[2], len(match[1]), match[3].strip(), number + 1
        elif match and match[2].startswith(fence) and not match[3].strip():
            found.append(Block(page, first, language, "".join(f"{line}\n" for line in lines)))
            fence, lines = "", []
        else:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
    if fence:
        raise ValueError(f"{page}:{first - 1}: a block that does not end")
    return found


def prose(page: Path) -> str:
    """A page without its blocks; lines keep their numbers."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        for number in range(block.line - 1, block.line + block.text.count("\n") + 1):
            lines[number - 1] = ""
    return "\n".join(lines)


def spans(page: Path) -> list[str]:
    """Code within the running text."""
    return [" ".join(match[2].split()) for match in _SPAN.finditer(prose(page))]


def links(page: Path) -> list[str]:
    """Targets of links that lead to other files or places of this repository."""
    targets = (match[1] for match in _LINK.finditer(_SPAN.sub("", prose(page))))
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """What `#...` may say of a page, as GitHub makes it of the headings."""
    headings = (match[1].replace("`", "").lower() for match in _HEADING.finditer(prose(page)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def command_lines(block: Block) -> Iterator[tuple[str, list[str]]]:
    """(the line, its words without the comment) of a block of shell commands; a backslash joins lines."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield line, words
