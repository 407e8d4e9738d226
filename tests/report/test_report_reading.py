"""What a reader of the pages meets: whole labels, names instead of numbers, one curve once, times in words, a phone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aimv2 import api
from aimv2.report.charts import LETTER, WIDTH, Line, Panel, draw, panels_of
from aimv2.report.facts import number, result_rows
from aimv2.report.runs import Run, date_of, read_run
from aimv2.report.samples import class_name
from world import TinyWorld

LABEL = re.compile(r'<text class="tick" x="([\d.]+)"[^>]*?text-anchor="(\w+)">([^<]*)</text>')
PHONE = """() => {
  const inside = (one, outer) => {
    const [a, b] = [one.getBoundingClientRect(), outer.getBoundingClientRect()]
    return a.left >= b.left - .5 && a.right <= b.right + .5 && a.top >= b.top - .5 && a.bottom <= b.bottom + .5
  }
  const outside = []
  for (const [parts, outer] of [['svg text', 'svg'], ['.shots figure', '.strip'], ['.note, .tokens', '.strip'], ['td', 'main']])
    for (const one of document.querySelectorAll(parts))
      if (one.closest(outer) && one.checkVisibility() && !inside(one, one.closest(outer)))
        outside.push(`${one.closest('section').id}: ${one.textContent}`)
  return [document.documentElement.scrollWidth - innerWidth, outside]
}"""


def labels(panel: Panel, last: int) -> tuple[list[str], list[str]]:
    """Tick labels of the x and of the y axis; all lie within the view box, also at the size that a phone shows."""
    found = LABEL.findall(draw(panel, last).svg)
    for x, anchor, text in found:
        left = float(x) - len(text) * LETTER * {"middle": 0.5, "end": 1.0}[anchor]
        assert left >= 0 and left + len(text) * LETTER <= WIDTH, text
    assert found[-1][2] == "step"
    return [text for _, anchor, text in found if anchor == "middle"], [
        text for _, anchor, text in found[:-1] if anchor == "end"
    ]


@pytest.mark.parametrize("last", [1, 3, 60, 5000, 12_500, 125_000, 1_250_000])
@pytest.mark.parametrize("values", [[0.0, 1.0], [1.23456, 1.23457], [1e-4, 1.8e-4], [0, 1.6e-4]])
def test_labels_of_charts_are_whole_and_no_two_are_alike(last: int, values: list[float]) -> None:
    steps, figures = labels(Panel("Loss", [Line("", [0, last], values)]), last)
    assert len(steps) == len(set(steps)) > 1 and len(figures) == len(set(figures)) > 2
    assert last > 10 or all(step.isdigit() for step in steps)  # no half steps


def run_of(world: TinyWorld, **changes: Any) -> Run:
    """The world's run with each line of its training metrics changed."""
    run = read_run(world.run)
    lines = [{**line, **{key: make(line) for key, make in changes.items()}} for line in run.metrics if "lr" in line]
    return replace(run, metrics=lines)


def test_throughput_in_other_units_is_one_curve_but_another_curve_stays(world: TinyWorld) -> None:
    rate = {"pairs_per_s": lambda line: 10.0 + line["step"] % 3}
    same = run_of(
        world,
        **rate,
        tokens_per_s=lambda line: 300.0 + 30 * (line["step"] % 3),
        mfu=lambda line: 0.02 + (line["step"] % 3) / 500,
    )
    titles = {panel.title: panel for panel in panels_of([same])}
    shown = [title for title in titles if "Throughput" in title or "FLOP" in title]
    assert shown == ["Throughput, pairs per second"]
    assert re.search(r"\d+ image and text positions per second, \d\.\d% MFU", titles[shown[0]].note)
    other = run_of(world, **rate, tokens_per_s=lambda line: 300.0 + line["step"], mfu=lambda line: 0.02 + line["step"])
    titles = {panel.title: panel for panel in panels_of([other])}
    assert len([title for title in titles if "Throughput" in title or "FLOP" in title]) == 3
    assert not titles["Throughput, pairs per second"].note


def test_a_sum_of_one_term_is_drawn_once(world: TinyWorld) -> None:
    run = run_of(world, loss=lambda line: line["text_loss"])
    assert "Loss (weighted sum)" in [panel.title for panel in panels_of([run])]  # of two terms
    for line in run.metrics:
        del line["pixel_loss"]
    titles = [panel.title for panel in panels_of([run])]
    assert "Text loss, nats per token" in titles and "Loss (weighted sum)" not in titles


def test_fractions_are_percent_and_seconds_are_words() -> None:
    assert number("train_seconds", 284.2) == "4 min 44 s" and number("seconds", 200_000) == "2 d 7 h"
    figures = {"miou": 0.25, "rmse": 0.5, "cider": 0.25, "text_to_image": {"R@1": 0.125}}
    rows = [row[:2] for row in result_rows("x", {"verb": "eval", "data": {"name": "d"}, "figures": figures})]
    assert rows == [
        ("eval on d: mIoU", "25.0%"),
        ("eval on d: RMSE, m", "0.500"),
        ("eval on d: CIDEr", "25.0"),
        ("eval on d: text to image R@1", "12.5%"),
    ]


def test_times_are_read_without_counting_zeros() -> None:
    assert date_of("2026-11-28T14:03:09+0000") == "28 Nov 2026, 14:03 UTC"
    assert date_of("2026-01-05T09:00:00+0200") == "5 Jan 2026, 09:00 UTC+02:00"
    assert date_of("yesterday") == "yesterday"


def test_classes_have_their_names() -> None:
    assert [class_name(label, ("cat", "dog")) for label in (1, 2, -1)] == ["dog", "class 2", ""]


@pytest.fixture(scope="module")
def page(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    api.report([str(world.run)], out=str(out), images=2)
    return out


def test_classes_layers_and_times_of_a_page(world: TinyWorld, page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    names = (world.scenes / "classes.txt").read_text().splitlines()
    told = re.findall(r"<figcaption>image: ([^<]+)</figcaption>", html)
    assert len(told) == 2 and set(told) <= set(names) and not re.search(r"class \d", html)
    assert set(re.findall(r"<figcaption>(layer [^<]+)</figcaption>", html)) == {"layer 0", "layer 1 (last)"}
    assert not re.search(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", html) and re.search(
        r"finished \d+ \w{3} 20\d\d, \d\d:\d\d", html
    )
    assert all(re.findall(r'<img alt="([^"]*)"', html))


def test_a_phone_shows_all_of_a_card(page: Path, browser: Any) -> None:
    sheet = browser.new_page(viewport={"width": 360, "height": 800})
    sheet.goto(page.as_uri())
    assert sheet.evaluate(PHONE) == [0, []]
    beside = (
        "[...document.querySelectorAll('#rollout .strip:first-child figure')].map(f => f.getBoundingClientRect().top)"
    )
    assert len(set(sheet.evaluate(beside))) == 1  # given, generated and truth side by side
    sheet.close()
