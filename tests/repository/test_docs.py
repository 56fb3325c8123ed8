"""Links, paths, numbers, tables and words of README, CONTRIBUTING, CHANGELOG and docs/."""

import html
import io
import pathlib
import re
import tokenize

import pytest
from helpers.pages import DOCS, PAGES, PARTS, ROOT, between, prose, spans, text_of
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax import summary
from halvit_jax.analysis.counts import summarize
from halvit_jax.models import list_models

FIELDS = "<!-- fields of halvit_jax/config.py -->"
SUMMARY = "<!-- python -m halvit_jax.summary --markdown -->"


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(text_of(linked)), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page: pathlib.Path) -> None:
    for code in spans(PARTS[page]):
        if re.fullmatch(r"(halvit_jax|tests|launch|docs)/[a-z0-9_/]+(\.\w+)?/?", code):
            assert (ROOT / code).exists(), f"{page.name}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: pathlib.Path) -> None:
    """A file of tests exists, and behind -k stand words that it contains."""
    for code in spans(PARTS[page]):
        paths = [ROOT / word for word in code.split() if re.fullmatch(r"tests/[\w/]+\.py", word)]
        assert all(path.is_file() for path in paths), f"{page.name}: {code}"
        if "pytest" in code and " -k " in code:
            wanted = re.search(r" -k (\w+|\"[^\"]+\")", code)[1].strip('"').split(" or ")
            source = "".join(path.read_text() for path in paths)
            assert not paths or all(word in source for word in wanted), f"{page.name}: {code}"


def test_the_site_has_every_page() -> None:
    listed = re.findall(r": (\w+\.md)$", (DOCS / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_stand_beside_the_command_that_made_them(page: pathlib.Path) -> None:
    """A table with a column of numbers, which is one aligned to the right, has a command in its section."""
    for section in re.split(r"^#+ ", PARTS[page], flags=re.MULTILINE):
        if re.search(r"^\|.*---:", section, re.MULTILINE):
            assert "python -m halvit_jax." in section or "python tests/" in section, f"{page.name}: {section[:60]}"


def test_sizes_in_the_readme_are_those_of_the_table_of_models() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]*)", (DOCS / "models.md").read_text(), re.MULTILINE)
    table = {name: [f"{int(count.replace(',', '')) / 1e6:.1f}" for count in counts if count] for name, *counts in rows}
    named = re.findall(r"`(\w+)` ([\d.]+)M", (ROOT / "README.md").read_text())
    assert len(named) >= 20
    for name, millions in named:
        assert millions in table[name], name  # as trained, or deployed


def _summary(names: list[str]) -> str:
    return summary.markdown({name: summarize(name) for name in names})


def test_some_models_count_what_the_table_of_models_says() -> None:
    block = between(DOCS / "models.md", SUMMARY).splitlines()
    for line in _summary(["halvit_tiny", "shvit_s1"]).splitlines():
        assert line in block


@pytest.mark.slow
def test_the_table_of_models_is_what_summary_prints() -> None:
    assert between(DOCS / "models.md", SUMMARY) == _summary(list_models())


def fields_of_config() -> str:
    """Every field of config.py with its default and its comment, a table for each sub-tree."""
    source = (ROOT / "halvit_jax/config.py").read_text()
    comments: dict[str, dict[str, str]] = {}  # in the order of the file
    tree = name = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.line.strip()
        if match := re.match(r"def _?(\w+)\(", line):
            tree, name = match[1].replace("default_config", ""), ""
        elif match := re.match(r'"(\w+)": ', line):
            name = match[1]
            comments.setdefault(tree, {}).setdefault(name, "")
        if token.type == tokenize.COMMENT and name and not re.match("# [A-Z]", line):  # which is a heading
            comments[tree][name] = f"{comments[tree][name]} {token.string.removeprefix('#').strip()}".strip()
    config, pages = config_lib.default_config(), []
    for tree in ["", *(name for name in comments[""] if isinstance(config[name], ConfigDict))]:
        fields = config[tree] if tree else config
        rows = [
            f"| `{f'{tree}.{name}'.lstrip('.')}` | {_default(fields[name])} | {html.escape(meaning, quote=False)} |"
            for name, meaning in comments[tree].items()
            if name in fields and not isinstance(fields[name], ConfigDict)
        ]
        assert len(rows) == sum(not isinstance(value, ConfigDict) for value in fields.values()), tree
        title = f"### {tree}\n\n" if tree else ""
        pages.append(f"{title}| field | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows))
    return "\n\n".join(pages)


def _default(value: object) -> str:
    text = f"`{value!r}`".replace("'", '"')
    return "" if value is None else "see `halvit_jax/config.py`" if len(text) > 30 or "|" in text else text


def test_the_page_of_fields_is_what_config_says(request: pytest.FixtureRequest) -> None:
    page, wanted = DOCS / "configuration.md", fields_of_config()
    if request.config.getoption("--update-golden", default=False):
        page.write_text(page.read_text().replace(between(page, FIELDS), wanted))
    assert between(page, FIELDS) == wanted


def test_the_map_of_contributing_leads_to_the_line() -> None:
    rows = re.findall(r"^\| .+\? \| `(.+)` \| `(.+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for path, word in rows:
        assert word in (ROOT / path).read_text(), f"{path}: {word}"


def test_words_are_those_of_the_field() -> None:
    forbidden = re.compile(r"\b(doors?|wish(es|ed)?|taught|twins?|rooms?)\b", re.IGNORECASE)
    paths = [*PAGES, ROOT / "tests/faults/RECORD.md", *(ROOT / "halvit_jax").rglob("*.py")]
    paths += [*(ROOT / "configs").glob("*.py"), *(ROOT / "launch").glob("*.sh")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []
