"""Questions on an image in the explorer: the answers, and that the shown attention is the language model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explored import ARTIFACTS, Reply, ask, serving

from aimv2 import api
from aimv2.explorer import chat
from aimv2.explorer.album import RequestError
from aimv2.explorer.answers import CHAT_BYTES, Answers
from aimv2.explorer.chat import fractions
from aimv2.explorer.prepare import prepare
from aimv2.interop.model_folder import save_model
from aimv2.models.create import create_model
from aimv2.vlm.model import open_processor
from tiny_llm import encoder, language_model, picture, vlm

TALK = ["What is this?", "a small red square", "Which colour?"]
WINDOW: dict[str, Any] = {"kind": "mistral", "sliding_window": 50}
LONG: dict[str, Any] = {"max_position_embeddings": 1024}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TOKENS", 8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pictures`` (one wide, one tall, one square) and four models: ``plain``, of a ``window``, ``tiled``, ``native``."""
    root = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    (root / "pictures").mkdir()
    for name, size in {"a-wide": (40, 24), "b-tall": (20, 50), "c-square": (32, 32)}.items():
        picture(*size).save(root / "pictures" / f"{name}.png")
    vlm(root / "plain")
    vlm(root / "window", **WINDOW)
    eyes = encoder(root / "native-eyes", native=True)
    api.vlm_build(eyes, root / "plain" / "llm", root / "native" / "vlm", image_size=64)
    llm = language_model(root / "llm", **LONG)
    api.vlm_build(root / "plain" / "eyes", llm, root / "tiled" / "vlm", tiles=2)
    return root


def opened(home: Path, kind: str) -> Answers:
    return prepare(str(home / kind / "vlm"), str(home / "pictures"), None, 0, 1, "cpu")


def reply(answers: Answers, image: int, texts: list[str] = TALK, **query: str) -> dict[str, Any]:
    return answers.chat({"model": "0", "image": str(image), **query}, json.dumps(texts).encode())


def by_transformers(home: Path, kind: str, answers: Answers, image: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The answer that the folder's own class generates, its tokens' probabilities, and their attention on the image tokens
    [layers, A, N], mean over heads: one forward pass over everything, without a cache.
    """
    from transformers import AutoModelForImageTextToText

    folder = home / kind / "vlm"
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    processor = open_processor(folder)
    first = [{"type": "image", "image": answers.study.album.image(image)}, {"type": "text", "text": TALK[0]}]
    turns = [
        {"role": "user", "content": first},
        *({"role": r, "content": t} for r, t in zip(("assistant", "user"), TALK[1:])),
    ]
    given = processor.apply_chat_template(
        [turns], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = given["input_ids"]
    given = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in given.items()}
    with torch.inference_mode():
        whole = model.generate(**given, max_new_tokens=chat.TOKENS, do_sample=False)
        answer = whole[0, ids.shape[1] :]
        answer = answer[: -1 if answer[-1] == model.generation_config.eos_token_id else None]
        whole = whole[:, : ids.shape[1] + len(answer)]
        given |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        out = model(**given, output_attentions=True)
    asks = slice(ids.shape[1] - 1, whole.shape[1] - 1)  # the positions that choose the tokens
    weights = torch.stack([one[0].float().mean(0) for one in out.attentions])[:, asks]
    scores = out.logits[0, asks].float().clone()
    scores[:, processor.image_token_id] = -torch.inf
    chances = scores.softmax(-1)[torch.arange(len(answer)), answer]
    text = processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return text, chances, weights[..., (whole == processor.image_token_id)[0]]


@pytest.mark.parametrize("kind", ["plain", "window", "native"])
def test_the_shown_attention_is_that_of_transformers(home: Path, kind: str) -> None:
    answers = opened(home, kind)
    text, chances, wanted = by_transformers(home, kind, answers, 0)
    found = reply(answers, 0)
    grid = answers.study.grid(0, 0)
    assert found["answer"] == text and found["layers"] == len(wanted) == 2 and len(found["words"]) == wanted.shape[1]
    assert wanted.sum() > 0
    wanted = wanted.unflatten(-1, grid)
    for layer, maps in {"all": wanted.mean(0), "0": wanted[0], "1": wanted[1]}.items():
        words = reply(answers, 0, layer=layer)["words"]
        np.testing.assert_allclose([word["attention"] for word in words], maps, atol=2e-6)
        np.testing.assert_allclose([word["share"] for word in words], maps.sum((-1, -2)), atol=6e-4)
    np.testing.assert_allclose([word["probability"] for word in found["words"]], chances, atol=1e-3)
    assert found["limit"] == len(found["words"]) == chat.TOKENS
    hidden = (wanted == 0).flatten(2).sum((0, 2)).tolist()
    assert (0 < hidden[0] < hidden[-1]) == (
        kind == "window"
    )  # the first patches are out of the window of the last tokens


@pytest.mark.parametrize("image", [0, 1, 2])
def test_tiles_keep_their_places_and_their_attention(home: Path, image: int) -> None:
    """A patch of a tile shows its own attention and its part of the thumbnail's; the newlines' is left out."""
    answers = opened(home, "tiled")
    text, _, wanted = by_transformers(home, "tiled", answers, image)
    found = reply(answers, image)
    small, rest = wanted.mean(0)[:, :16].unflatten(-1, (4, 4)), wanted.mean(0)[:, 16:]
    rows, columns = {0: (4, 8), 1: (8, 4), 2: (8, 8)}[image]  # without padding: 40 x 24, 20 x 50 and 32 x 32 px
    large = rest.unflatten(-1, (rows, columns + 1))[..., :columns]
    maps = torch.tensor([word["attention"] for word in found["words"]])
    assert found["answer"] == text and maps.shape == large.shape
    torch.testing.assert_close(maps.sum((1, 2)), small.sum((1, 2)) + large.sum((1, 2)), atol=1e-5, rtol=0)
    if image == 2:
        whole = large + small.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
        torch.testing.assert_close(maps, whole, atol=2e-6, rtol=0)


def test_parts_of_a_line() -> None:
    np.testing.assert_allclose(fractions(4, 2), [[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]])
    np.testing.assert_allclose(fractions(3, 2), [[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]], atol=1e-6)


def test_the_views_of_the_encoder_show_what_it_receives(home: Path) -> None:
    """The whole image, padded to a square; a place of it is found again in the view."""
    answers = opened(home, "plain")
    about = answers.about({})["models"][0]
    assert (
        about["chat"]
        and about["kind"] == "vision-language model"
        and set(about["cannot"]) == {"caption", "paint", "search"}
    )
    seen = answers.pixels({"model": "0", "image": "1"})
    assert (seen["rows"], seen["columns"], seen["box"]) == (4, 4, [-0.75, 0.0, 1.75, 1.0])
    pixels = answers.study.pixels(0, 1)
    mean = (torch.tensor(answers.study.model(0).encoder.config.mean) * 255).int()  # type: ignore[union-attr]
    assert (pixels[:, :, 0].int() - mean[:, None]).abs().max() <= 1
    query = {"model": "0", "image": "1", "layer": "1"}
    for call in (answers.pca, answers.similarity, answers.attention):
        assert call({**query, "row": "1", "column": "2"})
    for call in (answers.caption, answers.painting, answers.find):
        with pytest.raises(RequestError, match="This is a vision-language model"):
            call({**query, "share": "0.5", "text": "a dog"})


def post(url: str, content: bytes, headers: dict[str, str] | None = None, **query: Any) -> Reply:
    more = "".join(f"&{key}={value}" for key, value in query.items())
    return ask(url, f"/api/chat?model=0&image=0{more}", "POST", content, headers)


@pytest.fixture(scope="module")
def url(home: Path) -> Any:
    with serving(home / "plain" / "vlm", home / "pictures") as url:
        yield url


@pytest.mark.parametrize(
    ("content", "status", "query"),
    [
        (b"", 400, {}),
        (b"{}", 400, {}),
        (b'"What?"', 400, {}),
        (b"[]", 400, {}),
        (b'["What?", "a dog"]', 400, {}),
        (b'["What?", 1, "And?"]', 400, {}),
        (b'["  "]', 400, {}),
        (b'["\\ud800"]', 400, {}),
        (b'["<image>"]', 400, {}),
        (b"[" * 20_000, 400, {}),
        (b"\xff\xfe", 400, {}),
        (b'["' + b"What? " * 200 + b'"]', 409, {}),
        (b'["' + b"a" * CHAT_BYTES + b'"]', 413, {}),
        (b'["What?"]', 400, {"layer": 2}),
        (b'["What?"]', 400, {"layer": "first"}),
        (b'["What?"]', 404, {"image": 99}),
    ],
    ids=range(16),
)
def test_a_wrong_conversation_is_a_sentence(url: str, content: bytes, status: int, query: dict[str, Any]) -> None:
    answer = (
        post(url, content, **query) if "image" not in query else ask(url, "/api/chat?model=0&image=99", "POST", content)
    )
    assert answer.status == status and answer.error.endswith(".")


def test_only_its_own_page_asks(url: str) -> None:
    content = json.dumps(TALK[:1]).encode()
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert post(url, content, headers).status == 403
    assert post(url, content, {"Host": "evil.example"}).status == 400
    assert ask(url, "/api/chat?model=0&image=0").status == 404
    assert post(url, content).json["answer"] and post(url, content).headers["cache-control"] == "no-store"


def test_other_models_do_not_answer(home: Path) -> None:
    save_model(create_model("aimv2-tiny-patch8-32", seed=0, width=32, heads=2, hidden=48, depth=2), home / "encoder")
    answers = prepare(str(home / "encoder"), None, None, 0, 1, "cpu")
    assert not answers.about({})["models"][0]["chat"]
    with pytest.raises(RequestError, match="no language model"):
        reply(answers, 0)


def test_a_conversation_in_the_browser(open_screen: Any, home: Path, url: str) -> None:
    """Two turns; the whole answer, a token, a layer are each shown on the image; another image starts anew."""
    screen = open_screen().open(url)
    page = screen.page
    texts = []
    for turn, text in enumerate(("What is this?", "Which colour?")):
        page.fill("#question", text)
        page.press("#question", "Enter")
        page.wait_for_selector(f".turns li:nth-child({turn + 1}) .caption button")
        screen.settled()
        assert page.input_value("#question") == "" and "over the whole answer" in screen.text(
            "#chat .looked figcaption"
        )
        texts += [text, reply(opened(home, "plain"), 0, [*texts, text])["answer"]]
    wanted = reply(opened(home, "plain"), 0, texts[:3])["words"]
    whole = screen.drawn("#chat .looked canvas")
    page.locator(".turns li:nth-child(2) .caption button").nth(1).hover()
    token = screen.drawn("#chat .looked canvas")
    maps = np.array([word["attention"] for word in wanted])
    for drawn, map in ((whole, maps.mean(0)), (token, maps[1])):
        cells = drawn[56::112, 56::112].astype(int)  # 448 pixels a side, in the middle of each of 4 x 4 patches
        assert np.unravel_index(map.argmax(), map.shape) == np.unravel_index(yellow(cells).argmax(), map.shape)
    assert f"{100 * wanted[1]['share']:.1f}% of its attention" in screen.text("#chat .looked figcaption")
    page.select_option("#chat select", "1")
    screen.settled()
    assert "(layer 1, mean over heads)" in screen.text("#chat .looked figcaption")
    assert not np.array_equal(screen.drawn("#chat .looked canvas"), token)
    page.locator(".turns li:nth-child(1) .caption button").last.click()  # an earlier answer, in the same layer
    screen.settled()
    assert "over the whole answer" in screen.text("#chat .looked figcaption") and "(layer 1" in screen.text(
        "#chat .looked figcaption"
    )
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "explorer-chat.png", full_page=True)
    page.fill("#question", "<image>?")
    page.press("#question", "Enter")
    screen.settled()
    assert screen.text("#chat .status").startswith("<image> can't be part") and page.locator(".turns li").count() == 2
    assert page.input_value("#question") == "<image>?"
    page.click("#strip [title='c-square.png']")
    screen.settled()
    assert (
        page.locator(".turns li").count() == 0 and page.is_hidden("#chat .looked") and not screen.text("#chat .status")
    )


def yellow(cells: np.ndarray) -> np.ndarray:
    """How near to the map's highest colour; the image under it is grey."""
    return cells[..., 0] + cells[..., 1] - 2 * cells[..., 2]


def test_a_page_without_a_language_model_has_no_chat(open_screen: Any, home: Path) -> None:
    with serving(home / "plain" / "eyes", other=home / "plain" / "vlm") as url:
        screen = open_screen().open(url)
        assert screen.page.locator("#chat .model").count() == 1 and screen.page.is_visible("#question")
    with serving(home / "plain" / "eyes") as url:
        screen = open_screen().open(url)
        assert screen.page.is_hidden("#chat") and screen.page.is_hidden("#question")
