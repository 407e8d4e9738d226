"""MkDocs calls these: pages and pictures that the package itself writes, and links that work on the site as in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import made_tables
import method_pictures
import recipe_pages
import size_page
import source_pages
import verb_pages
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
MADE = re.compile(r"<!-- made: (\w+) -->")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):<code>~?(.*?)</code>")
OUTSIDE = re.compile(
    r"\]\((?:\.\./)+((?:recipes|src|benchmarks|notebooks|tests|docs/_build)/[^)#\s]*|[A-Z]+\.md)(#[^)]*)?\)"
)


def on_config(config: Any) -> Any:
    """Fill the navigation of commands, recipes and notebooks."""
    sections = {
        "Commands": ["verbs/index.md", *(f"verbs/{verb_pages.slug(name)}.md" for name in verb_pages.names())],
        "Recipes": ["recipes/index.md", *(f"recipes/{path.stem}.md" for path in recipe_pages.paths(ROOT))],
        "Notebooks": [source_pages.notebook_page(path) for path in source_pages.notebooks(ROOT)],
    }
    config.nav = [fill(entry, sections) for entry in config.nav]
    return config


def fill(entry: Any, sections: dict[str, list[str]]) -> Any:
    """``{Commands: null}`` with its pages, at any depth of the navigation."""
    if not isinstance(entry, dict):
        return entry
    ((title, inside),) = entry.items()
    if title in sections and not inside:
        return {title: sections[title]}
    return {title: [fill(one, sections) for one in inside] if isinstance(inside, list) else inside}


def on_files(files: Files, config: Any) -> Files:
    """Adds the written pages, the pictures, and a page for each file of the repository that a page links to."""
    pages: dict[str, str | bytes] = {
        **verb_pages.pages(),
        **recipe_pages.pages(ROOT),
        **size_page.pages(),
        **source_pages.notebook_pages(ROOT),
        **{f"pictures/{name}": content for name, content in method_pictures.pictures().items()},
    }
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        page, content = source_pages.page(ROOT, name)
        pages[page] = str(content)
    texts = [file.content_string for file in files.documentation_pages()]
    texts += [text for text in pages.values() if isinstance(text, str)]
    for text in texts:
        for match in OUTSIDE.finditer(text):
            page, content = source_pages.page(ROOT, match[1])
            if page not in pages and content is not None:
                pages[page] = content
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fills in what is made; links out of docs/ lead to the page of that file."""
    markdown = MADE.sub(lambda match: made_tables.made(match[1]), markdown)
    up = "../" * page.file.src_uri.count("/")

    def leads(match: re.Match[str]) -> str:
        return f"]({up}{source_pages.page(ROOT, match[1])[0]}{match[2] or ''})"

    return OUTSIDE.sub(leads, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Names of docstrings are written as Sphinx reads them (``:func:`x```); here they are code."""
    return ROLE.sub(r"<code>\1</code>", html)
