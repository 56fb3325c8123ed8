"""The documents as text: pages, and the blocks and pieces of code in them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]


def text_of(page: pathlib.Path) -> str:
    """The text of a page, with the files that it includes."""
    return re.sub(r'^--8<-- "(.+)"$', lambda match: (ROOT / match[1]).read_text(), page.read_text(), flags=re.MULTILINE)


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Code inside of sentences and tables, each on one line."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(text))]


def between(page: pathlib.Path, start: str, end: str = "<!-- end -->") -> str:
    """The text between two lines of a page."""
    return page.read_text().split(f"{start}\n")[1].split(end)[0].strip()


PARTS = {page: text_of(page) for page in PAGES}
