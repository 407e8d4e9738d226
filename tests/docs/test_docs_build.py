"""The site builds without a warning, asks nothing of the network, and holds what the code says."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from doc_commands import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config
from PIL import Image

import aimv2
from aimv2.commands.table import COMMANDS, function_name
from aimv2.config.schema import leaf_keys
from aimv2.models.sizes import MODELS, encoder_parameters

LOADS = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The site, built strictly."""
    folder, lines = tmp_path_factory.mktemp("site"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mkdocs")
    logger.addHandler(handler)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    finally:
        logger.removeHandler(handler)
    assert not lines, lines
    yield folder


class Loads(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        self.found += [str(given[name]) for kind, name in LOADS if kind == tag and given.get(name)]


def text_of(page: Path) -> str:
    """What is read on a page: tags out, entities back."""
    import html

    body = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        reader = Loads()
        reader.feed(page.read_text())
        assert reader.found
        for link in reader.found:
            assert not re.match(r"(https?:)?//", link), f"{page.name} loads {link}"
            target = (page.parent / link.split("?")[0].split("#")[0]).resolve()
            assert link.startswith("data:") or target.exists() or page.name == "404.html", f"{page.name} lacks {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text()), style.name


def test_every_verb_has_a_page_with_all_its_options(site: Path) -> None:
    for name, command in COMMANDS.items():
        text = text_of(site / "verbs" / f"{name.replace(' ', '-')}.html")
        assert f"aimv2 {name}" in text
        for word in command.words:
            assert word.rstrip("*").upper() in text
    text = text_of(site / "verbs" / "pretrain.html")
    for key in leaf_keys():
        assert f"--{key} " in text, key
    assert re.search(r"--train\.batch_size int auto pairs a step", text), "type, default, meaning"
    assert re.search(r"--pool mean \| attention \| none mean ", text_of(site / "verbs" / "embed.html"))


def test_every_recipe_has_a_page_with_its_values(site: Path) -> None:
    recipes = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "chains").glob("*.yaml")]
    assert all((site / "recipes" / f"{path.stem}.html").is_file() for path in recipes)
    text = text_of(site / "recipes" / "aimv2-3B-224.html")
    assert "optim.lr 0.0004 0.001 Table A1" in text
    assert "dfn2b-alt 0.3 {'alt': 1, 'caption': 1}" in text


def test_the_sizes_are_the_tables(site: Path) -> None:
    text = text_of(site / "sizes.html")
    for name, (encoder, _) in MODELS.items():
        assert re.search(rf"{re.escape(name)} .*?{encoder_parameters(encoder):,} ", text), name


def test_public_names_are_in_the_reference(site: Path) -> None:
    text = text_of(site / "reference.html")
    for name in aimv2.__all__:
        assert name == "__version__" or name in text, name
    for function in map(function_name, COMMANDS):
        assert f"{function} (" in text.replace("(", " (") or f"{function} ¶" in text, function
    assert ":func:" not in text and ":class:" not in text


def test_masks_in_the_pictures_are_the_models(site: Path) -> None:
    """Filled cells of the drawn matrices: prefix 1, 2, 4 and 5 of five patches, and nine causal positions."""

    def filled(name: str) -> int:
        tree = ElementTree.parse(site / "pictures" / name)
        return sum(node.get("fill") == "#3f51b5" for node in tree.iter("{http://www.w3.org/2000/svg}rect"))

    causal = 15
    assert filled("encoder-mask.svg") == causal + (causal + 1) + (causal + 6) + 25
    assert filled("decoder-mask.svg") == 45
    said = [node.text for node in ElementTree.parse(site / "pictures" / "positions.svg").iter() if node.text]
    assert said.count("patch 2") == 1 and said.count("patch 3") == 2, (
        "patch 3 is predicted behind a prefix of 2, patch 2 is not"
    )
    assert "[EOS]" in said


def test_targets_are_drawn_where_they_are_predicted(site: Path) -> None:
    panels = np.asarray(Image.open(io.BytesIO((site / "pictures" / "targets.png").read_bytes())).convert("RGB"))
    side = panels.shape[0]
    wanted = panels[:, -side:]
    patch = side // 8
    inside = wanted[2 * patch + 4 : 3 * patch - 4, 4 : 4 * patch - 4 : 7]  # the prefix of 20 ends in the third row
    behind = wanted[3 * patch + 4 : 4 * patch - 4, 4 : patch - 4]
    assert (inside == 255).all() and not (behind == 255).all()
    assert not (wanted[2 * patch + 4 : 3 * patch - 4, 4 * patch + 4 : 5 * patch - 4] == 255).all()


def test_the_memory_table_is_of_these_models(site: Path) -> None:
    text = text_of(site / "tutorials" / "many-gpus.html")
    assert "made: memory" not in text and re.search(r"large 5\d\d M 8\.\d\d GB 1\.\d\d GB 0\.\d\d GB", text)
