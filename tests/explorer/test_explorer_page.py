"""The explorer as a person uses it: Chromium drives the real page of a real server and looks at what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explored import ARTIFACTS, COLOURS, PATCHES, plain_pictures, sentence, serving, taught
from PIL import Image

from aimv2.data.stream.transforms import image_transform
from aimv2.explorer.album import KEPT
from aimv2.interop.model_folder import save_model
from aimv2.models.create import create_model
from runs import write_processor

DARK = 60  # brightness below which a background is dark


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, the ``pictures`` it was taught, and an ``encoder`` alone with smaller patches."""
    folder = tmp_path_factory.mktemp("page")
    taught(folder / "model")
    plain_pictures(folder / "pictures")
    options: dict = {"width": 32, "heads": 2, "hidden": 48, "depth": 2}
    save_model(create_model("aimv2-tiny-patch4-32", seed=1, **options), folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    with serving(place / "model", place / "pictures") as url:
        yield url


@pytest.fixture(scope="module")
def photograph(shared_data: Path) -> Path:
    return sorted((shared_data / "flickr8k-1k" / "images").glob("*.jpg"))[3]


def cells(picture: np.ndarray, side: int = PATCHES) -> np.ndarray:
    """The colour of the middle of every patch, [side, side, 3]."""
    step = picture.shape[0] // side
    return picture[step // 2 :: step, step // 2 :: step].astype(int)


def as_seen(path: Path) -> np.ndarray:
    model = create_model("aimv2-tiny-patch8-32", seed=0)
    return image_transform(model)(Image.open(path)).permute(1, 2, 0).numpy()


def test_a_photograph_from_upload_to_painting(open_screen: Any, url: str, photograph: Path) -> None:
    screen = open_screen().open(url)
    screen.upload(photograph)
    page = screen.page
    # the picture, as the model sees it, and its features
    step = screen.drawn(".truth canvas").shape[0] // 32
    assert np.array_equal(screen.drawn(".truth canvas")[step // 2 :: step, step // 2 :: step], as_seen(photograph))
    pca = screen.drawn(".pca canvas")
    assert pca.std(axis=(0, 1)).max() > 20 and len(np.unique(cells(pca).reshape(-1, 3), axis=0)) > PATCHES
    shallow = pca
    page.fill("#layer", "0")
    screen.settled()
    assert screen.text("#layer-said") == "layer 0 of 0 to 2" and not np.array_equal(
        screen.drawn(".pca canvas"), shallow
    )
    # a patch, and what is like it: itself most of all
    page.uncheck("#under")
    for row, column in ((0, 3), (2, 1)):
        screen.click_patch(row, column)
        brightness = cells(screen.drawn(".map canvas")).sum(-1)
        assert np.unravel_index(brightness.argmax(), brightness.shape) == (row, column)
        assert (brightness == brightness.max()).sum() == 1 and brightness.std() > 10
        assert f"row {row + 1}, column {column + 1}" in screen.text(".map figcaption")
        assert screen.text(".high") == "1.00"
    assert page.locator(".others li").count() == len(COLOURS)
    similar = screen.drawn(".map canvas")
    page.check("[value=attention]")
    screen.settled()
    assert not np.array_equal(screen.drawn(".map canvas"), similar) and page.is_hidden(".others")
    mean = screen.drawn(".map canvas")
    page.select_option("#head", index=2)
    assert not np.array_equal(screen.drawn(".map canvas"), mean) and "head 1" in screen.text(".map figcaption")
    # what it expects next: the given patches stay, the others change with what is given
    painted = {}
    for share, given in ((25, 4), (75, 12)):
        page.fill("#share", str(share))
        screen.settled()
        painted[given] = cells(screen.drawn(".predicted canvas")).reshape(-1, 3)
        assert f"the first {given} of 16 patches" in screen.text(".given figcaption")
    truth = cells(screen.drawn(".truth canvas")).reshape(-1, 3)
    for given, patches in painted.items():
        assert np.array_equal(patches[:given], truth[:given])
        assert (patches[given:] != truth[given:]).any(-1).all()
    assert np.array_equal(painted[4][:4], painted[12][:4]) and not np.array_equal(painted[4][4:12], painted[12][4:12])
    assert page.is_hidden(".rolled")
    page.fill("#share", "25")
    page.click("#roll")
    screen.settled()
    rolled = cells(screen.drawn(".rolled canvas")).reshape(-1, 3)
    assert np.array_equal(rolled[:4], truth[:4]) and not np.array_equal(rolled[5:], painted[4][5:])
    ARTIFACTS.mkdir(exist_ok=True)
    page.check("[value=similarity]")
    page.check("#under")
    screen.settled()
    page.screenshot(path=ARTIFACTS / "explorer.png", full_page=True)


def test_words_and_where_the_decoder_looked(open_screen: Any, url: str) -> None:
    screen = open_screen().open(url)
    page = screen.page
    page.click("#strip [title='blue.png']")
    screen.settled()
    words = page.locator(".caption button")
    assert words.all_inner_texts() == [*sentence("blue").split(), "end"]
    drawn = []
    for place, word in enumerate(["a", "blue"]):
        words.nth(place).hover()
        drawn.append(screen.drawn(".looked canvas"))
        assert f"“{word}”" in screen.text(".looked figcaption") and "% of its attention" in screen.text(
            ".looked figcaption"
        )
        assert screen.text(".word li.chosen").split()[0] == f"“{word}”"
    assert drawn[0].std() > 3 and not np.array_equal(*drawn)
    words.nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert "“sheet”" in screen.text(".looked figcaption")


def test_search_puts_the_right_picture_first(open_screen: Any, url: str) -> None:
    screen = open_screen().open(url)
    page = screen.page
    for name in ("yellow", "black"):
        page.fill("#text", f"A {name} sheet")
        page.press("#text", "Enter")
        page.wait_for_function("(name) => document.querySelector('.results img')?.alt === name", arg=f"{name}.png")
        screen.settled()
        rows = page.locator(".results li").all_inner_texts()
        scores = [float(row.split()[1]) for row in rows]
        assert len(rows) == len(COLOURS) and scores == sorted(scores, reverse=True) and scores[0] > 0 > scores[-1]
        assert "nats" in screen.text("#search .status") and "6 images" in screen.text("#search .status")
    shown = page.evaluate(
        "() => { const i = document.querySelector('.results img'); return i.complete && i.naturalWidth }"
    )
    assert shown == 40
    page.click(".results button")
    screen.settled()
    assert cells(screen.drawn(".truth canvas")).max() < 30  # the black one is looked at


def test_a_wrong_file_is_a_sentence_on_the_page(open_screen: Any, url: str, tmp_path: Path) -> None:
    screen = open_screen().open(url)
    before = screen.page.locator("#strip button").count()
    (tmp_path / "notes.jpg").write_text("no picture at all")
    screen.upload(tmp_path / "notes.jpg")
    assert screen.text("#message") == "This file can't be read as an image: a JPEG, PNG or WebP is expected."
    (tmp_path / "large.png").write_bytes(b"\0" * 1_200_000)
    screen.upload(tmp_path / "large.png")
    assert screen.text("#message") == "large.png has 1.2 MB; up to 1 MB are accepted."
    assert screen.page.locator("#strip button").count() == before
    Image.new("RGB", (30, 60), (200, 60, 20)).save(tmp_path / "good.webp")
    screen.upload(tmp_path / "good.webp")
    assert screen.text("#message") == ""
    assert screen.page.get_attribute("#strip button", "aria-pressed") == "true"
    assert screen.page.locator("#strip button").count() == before + 1


def test_by_keyboard_alone(open_screen: Any, url: str) -> None:
    """Tab to a picture, choose it; tab to the patches, move, choose; every stop shows where it is."""
    screen = open_screen().open(url)
    page = screen.page

    def tab_to(wanted: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            if page.evaluate("(wanted) => document.activeElement.matches(wanted)", wanted):
                return
        raise AssertionError(f"{wanted} is not reached")

    tab_to("#strip button")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.title") == "white.png"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    screen.settled()
    assert cells(screen.drawn(".truth canvas")).min() > 240
    tab_to("#layer")
    page.keyboard.press("ArrowLeft")
    screen.settled()
    assert screen.text("#layer-said") == "layer 1 of 0 to 2"
    tab_to("#under")
    page.keyboard.press("Space")
    tab_to(".pick canvas")
    before = screen.text(".map figcaption")
    assert "row 3, column 3" in before
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowRight"):  # the last of the first three has nowhere to go
        page.keyboard.press(key)
    assert "row 1, column 4" in page.get_attribute(".pick canvas", "aria-label")
    assert screen.text(".map figcaption") == before  # moved, not chosen
    page.keyboard.press("Enter")
    screen.settled()
    assert "row 1, column 4" in screen.text(".map figcaption")
    brightness = cells(screen.drawn(".map canvas")).sum(-1)
    assert brightness[0, 3] == brightness.max()
    tab_to(".caption button")
    tab_to("#share")
    tab_to("#text")
    page.keyboard.type("a red sheet")
    page.keyboard.press("Enter")
    page.wait_for_selector(".results li")
    screen.settled()
    for group in ("#strip", ".others ul", ".caption", ".results"):  # one stop each, however many images
        assert (
            page.eval_on_selector(group, "x => [...x.querySelectorAll('button')].filter(b => b.tabIndex === 0).length")
            == 1
        )
    tab_to(".results button")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement === document.querySelector('.results').lastElementChild.firstChild")
    page.keyboard.press("ArrowUp")  # the row above, where there are two
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.textContent.startsWith('1. ')")


def test_back_a_reload_and_a_copied_address_show_it_again(open_screen: Any, url: str) -> None:
    screen = open_screen().open(url)
    page = screen.page
    page.click("#strip [title='green.png']")
    screen.settled()
    page.fill("#layer", "0")
    screen.settled()
    screen.click_patch(0, 3)
    page.check("[value=attention]")
    screen.settled()
    page.select_option("#head", "1")
    page.fill("#share", "25")
    screen.settled()
    address, shown = page.url, [screen.drawn(f".{name} canvas") for name in ("pca", "map", "predicted", "truth")]
    assert (
        "row=1&column=4&mode=attention&head=1&given=25" in address and "layer=0" in address and "model=model" in address
    )
    for _ in range(3):  # the given patches, the head, the mode
        page.go_back()
        screen.settled()
    assert page.is_checked("[value=similarity]") and "row 1, column 4" in screen.text(".map figcaption")
    page.go_back()
    screen.settled()
    assert "row 3, column 3" in screen.text(".map figcaption")
    page.go_back()
    screen.settled()
    assert screen.text("#layer-said") == "layer 2 of 0 to 2" and "green" in page.title()
    page.go_back()
    screen.settled()
    assert "green" not in page.title() and page.url.startswith(url)
    for way in (lambda: screen.open(address), page.reload):
        way()
        screen.settled()
        for name, wanted in zip(("pca", "map", "predicted", "truth"), shown):
            assert np.array_equal(screen.drawn(f".{name} canvas"), wanted), name
        assert page.url == address
    first = screen.open(url).page.url
    page.click("#strip [title='red.png']")
    screen.settled()
    page.fill("#text", "a red sheet")
    page.click("#ask button")
    screen.settled()
    address, steps = page.url, page.evaluate("history.length")
    page.reload()
    screen.settled()
    assert (page.url, page.evaluate("history.length")) == (address, steps) and "text=a+red+sheet" in address
    assert page.locator(".results li").count() == len(COLOURS)
    page.evaluate("history.go(-2)")
    page.wait_for_function("() => !document.querySelector('#text').value")
    screen.settled()
    assert page.url == first and not page.locator(".results li").count() and not screen.text("#search .status")
    screen.open(f"{url}?image=99&model=another")
    assert screen.text("#message").startswith("This address was made with another; shown is model.")
    screen.open(f"{url}?image=99&layer=x&row=-3&column=999&head=7&mode=none&given=")
    assert screen.text("#message") == "This image is no longer stored; open it again." and screen.text(".others h4")


def test_without_scripts_the_page_says_what_it_needs(open_screen: Any, url: str) -> None:
    screen = open_screen(java_script_enabled=False)
    screen.page.goto(url)
    assert "JavaScript" in screen.text("body")


def test_images_that_were_added_stay_in_their_tab(open_screen: Any, url: str, photograph: Path, tmp_path: Path) -> None:
    """Several at once, the same file once; another tab lists none and shows one by its address; Delete and a button remove."""
    screen, other = open_screen().open(url), open_screen().open(url)
    page = screen.page
    before = page.locator("#strip button").count()
    Image.new("RGB", (30, 60), (200, 60, 20)).save(tmp_path / "second.png")
    page.set_input_files("#file", [photograph, tmp_path / "second.png"])
    screen.settled()
    screen.upload(photograph)
    assert page.locator("#strip button").count() == before + 2 and photograph.name in page.title()
    for at in range(KEPT):
        Image.new("RGB", (9, 9), (at, 9, 9)).save(tmp_path / f"small-{at}.png")
    other.page.set_input_files("#file", [*sorted(tmp_path.glob("small-*.png")), tmp_path / "second.png"])
    other.settled()
    assert other.text("#notice") == f"Up to {KEPT} added images are kept; removed: small-0.png."
    page.reload()
    screen.settled()
    assert page.locator("#strip button").count() == before + 2
    other = open_screen().open(page.url)
    assert other.page.locator("#strip button").count() == before and other.page.is_hidden("#remove")
    assert np.array_equal(other.drawn(".truth canvas"), screen.drawn(".truth canvas"))
    page.click("#remove")
    screen.settled()
    assert page.locator("#strip button").count() == before + 1 and photograph.name not in page.title()
    page.focus("#strip button")
    page.keyboard.press("Delete")
    page.wait_for_function("(n) => document.querySelectorAll('#strip button').length === n", arg=before)
    screen.settled()
    assert page.is_hidden("#remove") and screen.text("#message") == ""


def test_small_screens_and_the_dark(open_screen: Any, url: str) -> None:
    light = open_screen().open(url)
    back = "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    assert min(light.page.evaluate(back)) > 200
    small = open_screen(viewport={"width": 360, "height": 740}, color_scheme="dark", device_scale_factor=2).open(url)
    page = small.page
    page.fill("#text", "a green sheet")
    page.press("#text", "Enter")
    page.click("#roll")
    page.check("[value=attention]")
    page.wait_for_selector(".results li")
    small.settled()
    assert small.width() == 360
    assert max(page.evaluate(back)) < DARK
    ink = page.evaluate("getComputedStyle(document.querySelector('h2')).color.match(/\\d+/g).map(Number)")
    assert min(ink[:3]) > 180
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "explorer-phone-dark.png", full_page=True)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('img, canvas, input, button, select')].filter((x) => x.checkVisibility() && "
        "!(x.alt || x.ariaLabel || x.getAttribute('aria-label') || x.labels?.length || x.textContent.trim() || x.querySelector('[alt]')))"
        ".map((x) => x.outerHTML)"
    )
    assert unnamed == []


def test_two_models_side_by_side_and_what_one_cannot(open_screen: Any, place: Path) -> None:
    """The encoder alone says what it lacks; a click goes to the same place in both, whatever their patches."""
    with serving(place / "model", place / "pictures", other=place / "encoder") as url:
        screen = open_screen().open(url)
        page = screen.page
        first, second = (page.locator("#parts .model").nth(at).bounding_box() for at in (0, 1))
        assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
        screen.click_patch(1, 3)
        said = page.locator(".map figcaption").all_inner_texts()
        assert "row 2, column 4" in said[0] and "row 4, column 8" in said[1]
        for section in ("words", "next", "search"):
            sentences = page.locator(f"#{section} .model").nth(1).locator(".status").inner_text()
            assert sentences.startswith("This model is only an encoder")
        assert page.is_enabled("#roll") and page.locator(".predicted canvas").nth(1).is_hidden()
        page.fill("#layer", "0")
        screen.settled()
        assert screen.text("#layer-said") == "layer 0 of 0 to 2 (model), layer 0 of 0 to 1 (encoder)"
        labels = page.locator("main [aria-label]").evaluate_all("all => all.map((x) => x.ariaLabel)")
        labels = [label for label in labels if label not in ("model", "encoder")]  # the groups, one a section
        assert len(set(labels)) == len(labels)
    with serving(place / "encoder") as url:
        screen = open_screen().open(url)
        assert not any(screen.page.is_enabled(control) for control in ("#share", "#roll", "#text", "#ask button"))
        assert screen.page.is_enabled("#layer") and screen.page.locator("#strip button").count() == 12
        screen.page.click("#example")
        screen.page.wait_for_function("() => document.querySelectorAll('#strip button').length === 13")
        screen.settled()
        assert screen.drawn(".pca canvas").std() > 20


def test_a_model_of_another_origin_beside_ours(open_screen: Any, place: Path, photograph: Path) -> None:
    """Where attention is asked for, it goes on with similar patches of the place that was clicked, and says so."""
    from transformers import Dinov2Config, Dinov2Model

    shape: dict = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**shape, image_size=56, patch_size=14)).save_pretrained(place / "dino")
    write_processor(place / "dino")
    with serving(place / "model", place / "pictures", other=place / "dino") as url:
        screen = open_screen().open(url)
        page = screen.page
        page.check("[value=attention]")
        screen.click_patch(2, 1)
        ours, theirs = page.locator(".map figcaption").all_inner_texts()
        assert "Attention of the framed patch (row 3, column 2)" in ours
        assert (
            "Cosine of every patch with the framed one (row 3, column 2)" in theirs
            and "only features are shown" in theirs
        )
        assert "error" not in page.locator("#parts .status").nth(1).get_attribute("class")
    with serving(place / "dino", place / "pictures") as url:
        screen = open_screen().open(url)
        screen.upload(photograph)
        assert screen.page.is_disabled("[value=attention]") and screen.drawn(".pca canvas").std() > 20
        screen.page.uncheck("#under")
        screen.click_patch(0, 1)
        brightness = cells(screen.drawn(".map canvas")).sum(-1)
        assert np.unravel_index(brightness.argmax(), brightness.shape) == (0, 1)
