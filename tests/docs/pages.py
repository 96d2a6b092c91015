"""The pages of the documentation, and what stands in them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def page(name: str) -> str:
    """The text of a page in docs/."""
    return (ROOT / "docs" / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    """The code of a language in a text; "" for blocks that name none."""
    return [code for name, code in _BLOCK.findall(text) if name == language]


def links(text: str) -> list[str]:
    """Targets of links to files of this repository, without their anchors."""
    targets = [target.partition("#")[0] for target in _LINK.findall(_BLOCK.sub("", text))]
    return [target for target in targets if target and "://" not in target]


def anchors(text: str) -> set[str]:
    """What a link may name behind the #: headings, as web pages of Markdown spell them."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of whatever level."""
    below = text.partition(f"\n{heading}\n")[2]
    assert below, heading
    return re.split(r"^#+ ", below, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables, without their heads, each cell without its backquotes."""
    found = []
    lines = text.splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith("|") and before.startswith("|") and "---" not in line:
            cells = line.replace("\\|", "\0").strip("|").split("|")
            found.append([cell.replace("\0", "|").replace("`", "").strip() for cell in cells])
    return found
