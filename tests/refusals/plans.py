"""Plans, given by ``--plan`` or by Python, that say something else than widths of this model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm

import gohsp
from gohsp import cli
from gohsp.errors import PlanError
from refusals import Refusal

TITLE = "Plans"

WHOLE = {"heads": 4, "qk": 8, "vo": 8, "ffn": 64}


def tiny() -> Any:
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **size, mlp_ratio=2, num_classes=10)


def pruned(shapes: Sequence[Any], folder: Path) -> object:
    """Prune the tiny model to ``shapes``; nothing is begun."""
    recipe = gohsp.Recipe(route="oneshot")
    try:
        return gohsp.prune(tiny(), "digits", "params=-1%", folder / "run", recipe=recipe, shapes=shapes)
    finally:
        assert not (folder / "run").exists()


def file(text: str) -> Callable[[Path], object]:
    """Give ``--plan`` a file of this text."""

    def act(folder: Path) -> object:
        (folder / "plan.json").write_text(text, encoding="utf-8")
        return pruned(cli.read_plan(folder / "plan.json"), folder)

    return act


def width(**change: Any) -> Callable[[Path], object]:
    """A plan file whose second block has another width."""
    return file(json.dumps([WHOLE, {**WHOLE, **change}]))


CASES = (
    Refusal("a plan that is no JSON", file("{"), PlanError, "cannot be read"),
    Refusal("a plan nested without end", file("[" * 100_000), PlanError, "cannot be read"),
    Refusal("a plan that is a table", file("{}"), PlanError, "must be a list of one table a block"),
    Refusal("a plan of one block of two", file(json.dumps([WHOLE])), PlanError, "has 1 blocks, the model has 2"),
    Refusal("a plan with a misspelt key", width(fnn=3), PlanError, "unknown key 'fnn'; did you mean 'ffn'?"),
    Refusal("a width of 0", width(qk=0), PlanError, "'qk' must be a whole number above 0, got 0"),
    Refusal("a negative width", width(ffn=-3), PlanError, "'ffn' must be a whole number above 0, got -3"),
    Refusal("a width of 8.0", width(vo=8.0), PlanError, "'vo' must be a whole number above 0, got 8.0"),
    Refusal("a width of NaN", width(vo=float("nan")), PlanError, "'vo' must be a whole number above 0, got nan"),
    Refusal("a width of true", width(heads=True), PlanError, "'heads' must be a whole number above 0, got True"),
    Refusal("a width above the model's", width(heads=5), PlanError, "'heads' must be from 1 to 4, got 5"),
    Refusal("a huge width", width(ffn=2**64), PlanError, "'ffn' must be from 1 to 64, got 18446744073709551616"),
    Refusal("a width of 5,000 digits", file(f'[{{"heads": {"9" * 5000}}}]'), PlanError, "cannot be read"),
    Refusal("a plan that cuts nothing", file(json.dumps([WHOLE, WHOLE])), PlanError, "cut more"),
    Refusal(
        "a width of 7.5, by Python",
        lambda folder: pruned([gohsp.BlockShape(**WHOLE), gohsp.BlockShape(**{**WHOLE, "ffn": 7.5})], folder),
        PlanError,
        "'ffn' must be a whole number, got 7.5",
    ),
    Refusal("tables for shapes, by Python", lambda folder: pruned([WHOLE, WHOLE], folder), PlanError, "BlockShape"),
)
