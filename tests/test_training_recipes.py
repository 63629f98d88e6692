"""The recipes of docs/training.md, run as they stand there, from top to bottom."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch

import gohsp

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
OPTIONAL = ("lightning",)
"""What a recipe may need that the tests are run without."""

TRAIN = """
import argparse, timm, torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model")
parser.add_argument("--img-size", type=int)
args, _ = parser.parse_known_args()
model = timm.create_model(args.model, pretrained=False, in_chans=3, num_classes=None, drop_path_rate=None)
size = resolve_data_config(vars(args), model=model)["input_size"]
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
labels = torch.arange(4) % model.num_classes
torch.nn.functional.cross_entropy(model.train()(torch.randn(4, *size)), labels).backward()
optimizer.step()
CheckpointSaver(model, optimizer, args, checkpoint_dir=".", recovery_dir=".").save_checkpoint(0)
"""
"""In place of timm's own, which no package holds: it makes, trains and saves a model by the same functions."""


def blocks(mark: str = "") -> Iterator[tuple[int, str]]:
    """The Python blocks of the page with their lines; with a mark those of a file."""
    text = PAGE.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```python{re.escape(mark)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start(1)].count("\n"), found[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page's names stand for at its end; its files lie in the present folder."""
    names: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        torch.manual_seed(0)
        for line, code in blocks():
            if not any(f"import {name}" in code and importlib.util.find_spec(name) is None for name in OPTIONAL):
                exec(compile("\n" * line + code, str(PAGE), "exec"), names)
        yield names


def test_every_recipe_trains_a_pruned_model(ran: dict[str, Any]):
    image = ran["images"][:1]
    widths = ran["pruned"].widths
    assert gohsp.describe(gohsp.load("small")).widths == widths
    assert gohsp.describe(ran["small"]).widths == widths  # ADMM's, fine-tuned
    again = gohsp.load("small-vit").eval()
    with torch.no_grad():
        assert torch.equal(again(image).logits, ran["small_vit"].eval()(image).logits)


def test_a_uniform_model_has_a_name_for_timms_script(ran: dict[str, Any]):
    made = timm.create_model("local-dir:plain", pretrained=True, num_classes=10).eval()
    with torch.no_grad():
        torch.testing.assert_close(made(ran["images"]), ran["uniform"](ran["images"]))


def test_the_trainers_own_checkpoints_hold_the_widths_of_a_uniform_model(ran: dict[str, Any]):
    vit = gohsp.prune(ran["vit"], ran["train"], "params=-20%", uniform=True).model
    vit.save_pretrained("uniform-vit")
    assert json.loads(Path("uniform-vit/config.json").read_text())["intermediate_size"] < 256
    assert sum(map(torch.numel, type(vit).from_pretrained("uniform-vit").parameters())) == sum(
        map(torch.numel, vit.parameters())
    )


def test_any_model_has_a_name_for_timms_script(ran: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    ((_, script),) = blocks(' title="train_small.py"')
    Path("train_small.py").write_text(script)
    Path("train.py").write_text(TRAIN)
    monkeypatch.setattr(sys, "argv", ["train_small.py", "data", "--model", "small", "--img-size", "32"])
    runpy.run_path("train_small.py", run_name="__main__")
    before, trained = gohsp.load("small"), gohsp.load("small")
    timm.models.load_checkpoint(trained, "last.pth.tar")
    gohsp.save(trained, "trained")
    with torch.no_grad():
        assert not torch.equal(gohsp.load("trained")(ran["images"]), before(ran["images"]))
