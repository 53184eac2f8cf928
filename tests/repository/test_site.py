"""The site of the docs: every page is in it, no link of it dangles, it asks nothing of the network."""

from __future__ import annotations

import html.parser
import runpy
from pathlib import Path
from urllib.parse import unquote

import pytest

import fagen

pytest.importorskip("markdown_it", reason="no markdown-it-py to build the site with (pip install markdown-it-py)")

ROOT = Path(__file__).parents[2]
SITE = runpy.run_path(str(ROOT / "docs" / "site.py"))


class Links(html.parser.HTMLParser):
    """The links, anchors and whatever a browser would fetch by itself, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values["id"]} if "id" in values else set()
        self.links += [values["href"]] if tag == "a" else []
        self.fetched += [values[name] for name in ("src", "href") if name in values and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Links]:
    folder = tmp_path_factory.mktemp("site")
    SITE["build"](folder)
    return {path: Links(path.read_text()) for path in folder.rglob("*.html")}


def test_every_page_is_in_it(site):
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
    assert {path.relative_to(ROOT).as_posix() for path in pages} == SITE["PAGES"].keys()
    assert len(site) == len(pages)


def test_no_link_dangles(site):
    within = 0
    for path, page in site.items():
        for link in page.links:
            place, _, anchor = link.partition("#")
            if link.startswith("https://"):
                inside = place.partition(f"{SITE['repository']()}/blob/HEAD/")[2]
                assert not inside or (ROOT / inside).exists(), link
                continue
            to = (path.parent / unquote(place)).resolve() if place else path
            assert to in site, f"{path.name}: {link}"
            assert not anchor or unquote(anchor) in site[to].anchors, f"{path.name}: {link}"
            within += 1
    assert within > 300


def test_it_needs_no_network(site):
    pictures = 0
    for path, page in site.items():
        for link in page.fetched:
            assert (path.parent / link).is_file(), f"{path.name}: {link}"
            pictures += 1
    assert pictures >= 4


def test_a_link_to_nothing_stops_the_build():
    with pytest.raises(FileNotFoundError, match=r"README\.md links to docs/nothing\.md"):
        SITE["target"]("docs/nothing.md", "README.md")


def test_the_api_page_has_every_public_name(site):
    (page,) = (links for path, links in site.items() if path.name == "api.html")
    text = (ROOT / "docs" / "api.md").read_text()
    for name in fagen.__all__:
        assert SITE["slug"](f"fagen.{name}") in page.anchors, name
        value = getattr(fagen, name)
        first = (value.__doc__ or "").strip().partition("\n")[0] if name != "__version__" else ""
        assert first in text, f"{name} has another docstring; run: make docs"


def test_code_in_a_list_is_code(site):
    """As the viewers of repositories read it, and not every Markdown library."""
    (path,) = (path for path in site if path.name == "CONTRIBUTING.html")
    assert '<code class="language-cpp">{% include' in path.read_text()
