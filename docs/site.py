"""The pages of the repository as a site: `make docs-site`, or python docs/site.py FOLDER. It needs no network, nor does
the site. Pages are read as CommonMark with tables, which is how a repository's own viewer reads them."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "": [
        "README.md",
        "docs/api.md",
        "docs/serving.md",
        "docs/coming-from.md",
        "docs/reference.md",
        "examples/README.md",
    ],
    "Tuning": ["docs/tuning.md", "docs/search.md", "docs/report.md", "docs/database.md"],
    "Measuring": ["docs/bench.md", "docs/ablation.md"],
    "How it works": ["docs/architecture.md", "docs/softmax.md", "docs/knobs.md", "docs/sm90.md"],
    "Notes": [
        "docs/notes/cpu_forward.md",
        "docs/notes/cpu_backward.md",
        "docs/notes/cpu_decode.md",
        "docs/notes/sm80_forward.md",
        "docs/notes/sm80_forward_fp32.md",
        "docs/notes/sm80_backward.md",
        "docs/notes/sm80_decode.md",
        "docs/notes/sm90_decode.md",
        "docs/notes/sm90_decode_mla.md",
        "docs/notes/simt.md",
        "docs/notes/sm90_forward.md",
        "docs/notes/sm90_forward_large.md",
        "docs/notes/sm90_forward_fp8.md",
        "docs/notes/sm90_backward.md",
        "docs/notes/sm90_backward_large.md",
        "docs/notes/softmax.md",
    ],
    "Project": ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"],
}
PAGES = {name: name.removesuffix(".md") + ".html" for names in SECTIONS.values() for name in names}
PAGES["README.md"] = "index.html"
_ENVIRONMENT = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
_TEMPLATE = _ENVIRONMENT.from_string("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --code: light-dark(#f4f4f2, #262626); }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; display: grid; grid-template-columns: 15rem minmax(0, 1fr); }
nav { padding: 1.2rem; border-right: 1px solid var(--line); font-size: .92rem; }
nav div { position: sticky; top: 1.2rem; max-height: 95vh; overflow: auto; }
nav a { display: block; padding: .1rem 0; text-decoration: none; } nav a.here { font-weight: 650; }
nav b { display: block; margin-top: .8rem; } nav a.part { padding-left: .9rem; font-size: .86rem; }
main { padding: .6rem 2rem 4rem; max-width: 60rem; }
pre { background: var(--code); padding: .7rem .9rem; overflow-x: auto; font-size: .86rem; line-height: 1.4; }
code { font-size: .92em; background: var(--code); } img { max-width: 100%; background: #fff; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
@media (max-width: 50rem) { body { display: block; } nav { border: 0; } }
</style>
<body>
<nav><div>
{% for section, links in sections.items() %}
{% if section %}<b>{{ section }}</b>{% endif %}
{% for name, href, here in links %}
<a href="{{ href }}"{{ ' class="here"' | safe if here }}>{{ name }}</a>
{% for part, anchor in parts if here %}<a class="part" href="#{{ anchor }}">{{ part }}</a>
{% endfor %}
{% endfor %}
{% endfor %}
</div></nav>
<main>
{{ body | safe }}
</main>
</body>
</html>
""")


def slug(words: str) -> str:
    """The anchor of a heading, as the viewers of repositories make it."""
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")


def repository() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]


def parsed(name: str) -> tuple[list[Token], list[tuple[str, str, str]]]:
    """A page's tokens, and (tag, words, anchor) of its headings, whose anchors are set."""
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / name).read_text(encoding="utf-8"))
    headings: list[tuple[str, str, str]] = []
    for token, following in itertools.pairwise(tokens):
        if token.type == "heading_open":
            words = "".join(t.content for t in following.children or () if t.type in ("text", "code_inline"))
            again = sum(anchor == slug(words) for _, _, anchor in headings)
            headings.append((token.tag, words, slug(words) + (f"-{again}" if again else "")))
            token.attrSet("id", headings[-1][2])
    return tokens, headings


def target(link: str, name: str) -> str:
    """Where a link of a page leads in the site: to another page, a picture, or a file of the repository."""
    if re.match(r"\w+:|#", link):
        return link
    path, mark, anchor = link.partition("#")
    found = ((ROOT / name).parent / path).resolve()
    if not found.exists():
        raise FileNotFoundError(f"{name} links to {path}, which does not exist")
    inside = found.relative_to(ROOT).as_posix()
    if inside in PAGES or inside.startswith("docs/img/"):
        return os.path.relpath(PAGES.get(inside, inside), Path(PAGES[name]).parent) + mark + anchor
    return f"{repository()}/blob/HEAD/{inside}{mark}{anchor}"


def page(name: str, titles: dict[str, str]) -> str:
    tokens, headings = parsed(name)
    for token in tokens:
        for child in token.children or ():
            for attribute in ("href", "src"):
                if attribute in child.attrs:
                    child.attrs[attribute] = target(str(child.attrs[attribute]), name)
    here = Path(name).parent
    sections = {
        section: [(titles[other], target(os.path.relpath(other, here), name), other == name) for other in names]
        for section, names in SECTIONS.items()
    }
    markdown = MarkdownIt("commonmark").enable("table")
    return _TEMPLATE.render(
        title=titles[name] if titles[name] == "fagen" else f"{titles[name]} · fagen", sections=sections,
        body=markdown.renderer.render(tokens, markdown.options, {}), parts=[h[1:] for h in headings if h[0] == "h2"],
    )  # fmt: skip


def build(folder: Path) -> None:
    titles = {name: next(words for tag, words, _ in parsed(name)[1] if tag == "h1") for name in PAGES}
    for name, place in PAGES.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(page(name, titles), encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "img", folder / "docs" / "img", dirs_exist_ok=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
