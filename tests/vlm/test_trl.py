"""TRL's SFTTrainer trains the folder of ``vlm build`` on LLaVA's JSON, as docs/vlm.md says; its words are what runs here."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from aimv2 import api
from aimv2.data.shards.format import read_samples
from aimv2.data.text.conversations import read_conversation
from aimv2.vlm.model import open_vlm
from tiny_llm import encoder, language_model, picture

pytest.importorskip("trl", reason="pip install trl")
PAGE = (Path(__file__).parents[2] / "docs" / "vlm.md").read_text().partition("with TRL\n")[2]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder(tmp_path / "eyes")
    language_model(tmp_path / "llm")
    api.vlm_build("eyes", "llm", "OUT")
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(40, 30).save(tmp_path / "images" / f"{number}.png")
    rows = [
        {"image": f"{n}.png", "conversations": turns("<image>\nWhat is this?", "red", "Sure?", "yes")} for n in range(4)
    ]
    rows.append({"image": ["0.png", "1.png"], "conversations": turns("<image>\n<image>\nSame?", "no")})  # type: ignore[dict-item]
    rows.append({"conversations": turns("What is this?", "a text")})
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "vlm.md", "exec"), {})
    (line,) = re.findall(r"^trl (sft .*)$", PAGE, re.MULTILINE)
    few = "--max_steps 2 --per_device_train_batch_size 3 --learning_rate 1e-2 --use_cpu --bf16 false --report_to none"
    monkeypatch.setattr(sys, "argv", shlex.split(f"{line} {few}"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runpy.run_module("trl.scripts.sft", run_name="__main__")
    before, after = (open_vlm(name)[0].connector.state_dict() for name in ("OUT", "tuned"))
    assert all(not torch.equal(before[key], after[key]) for key in before)
    result = api.data_import("table", "talks", image_root=".", conversations=True)
    assert (result["train"], result["rejected"]) == (6, 0)
    found = [read_conversation(parts) for _, parts in read_samples(tmp_path / "talks" / "train-000000.tar")]
    assert [len(images) for _, images in found] == [1, 1, 1, 1, 2, 0]
    assert [talk.record() for talk, _ in found] == [row["conversations"] for row in rows]
