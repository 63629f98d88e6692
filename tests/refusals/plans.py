"""Plans, given by ``--plan`` or by Python, that say something else than widths of this model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm

import gohsp
from gohsp import cli
from gohsp.errors import PlanError
from refusals import Refusal

TITLE = "Plans"

ATTENTION, FFN = {"heads": 4, "qk": 8, "vo": 8}, {"units": 64}
WHOLE = {f"blocks.{i}.{name}": of for i in (0, 1) for name, of in (("attn", ATTENTION), ("mlp", FFN))}


def tiny() -> Any:
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **size, mlp_ratio=2, num_classes=10)


def pruned(widths: Any, folder: Path) -> object:
    """Prune the tiny model to ``widths``; nothing is begun."""
    try:
        return gohsp.run(tiny(), "digits", "params=-1%", folder / "run", widths=widths)
    finally:
        assert not (folder / "run").exists()


def file(text: str) -> Callable[[Path], object]:
    """Give ``--plan`` a file of this text."""

    def act(folder: Path) -> object:
        (folder / "plan.json").write_text(text, encoding="utf-8")
        return pruned(cli.read_plan(folder / "plan.json"), folder)

    return act


def plan(**changes: Any) -> Callable[[Path], object]:
    """A plan file whose second block has other widths; None takes one away."""
    table = dict(WHOLE)
    for key, value in changes.items():
        name = "blocks.1.attn" if key in ATTENTION else "blocks.1.mlp"
        table[name] = {k: v for k, v in {**table[name], key: value}.items() if v is not None}
    return file(json.dumps(table))


def by_python(widths: Any) -> Callable[[Path], object]:
    """Widths that are given as they are."""
    return lambda folder: pruned(widths, folder)


def excluded(*names: str) -> Callable[[Path], object]:
    """Leave something alone."""
    return lambda folder: gohsp.run(tiny(), "digits", "params=-1%", folder / "run", exclude=names)


CASES = (
    Refusal("a plan that is no JSON", file("{"), PlanError, "cannot be read"),
    Refusal("a plan nested without end", file("[" * 100_000), PlanError, "cannot be read"),
    Refusal("a plan that is a list", file("[]"), PlanError, "must be a table with a table for each sub-layer"),
    Refusal("a plan without a sub-layer of the model", file("{}"), PlanError, "the plan lacks ['blocks.0.attn'"),
    Refusal(
        "a plan with a sub-layer that the model has not",
        file(json.dumps({**WHOLE, "blocks.2.mlp": FFN})),
        PlanError,
        "has a sub-layer 'blocks.2.mlp', the model has none; there are 'blocks.0.mlp' to 'blocks.1.mlp'",
    ),
    Refusal(
        "an attention's widths for an FFN",
        file(json.dumps({**WHOLE, "blocks.1.mlp": ATTENTION})),
        PlanError,
        "'blocks.1.mlp' of the plan must have FfnWidths",
    ),
    Refusal("a plan with a misspelt key", plan(unit=3), PlanError, "unknown key 'unit'; did you mean 'units'?"),
    Refusal("a plan that lacks a width", plan(vo=None), PlanError, "'blocks.1.attn' of the plan lacks ['vo']"),
    Refusal("one width of 0 and others not", plan(qk=0), PlanError, "give no width of 0, or all of them"),
    Refusal("a negative width", plan(units=-3), PlanError, "'units' must be a whole number of at least 0, got -3"),
    Refusal("a width of 8.0", plan(vo=8.0), PlanError, "'vo' must be a whole number of at least 0, got 8.0"),
    Refusal("a width of NaN", plan(vo=float("nan")), PlanError, "'vo' must be a whole number of at least 0, got nan"),
    Refusal("a width of true", plan(heads=True), PlanError, "'heads' must be a whole number of at least 0, got True"),
    Refusal("a width above the model's", plan(heads=5), PlanError, "'heads' must be from 1 to 4, got 5"),
    Refusal("a huge width", plan(units=2**64), PlanError, "'units' must be from 1 to 64, got 18446744073709551616"),
    Refusal("a width of 5,000 digits", file(f'{{"a": {{"units": {"9" * 5000}}}}}'), PlanError, "cannot be read"),
    Refusal("a plan that cuts nothing", file(json.dumps(WHOLE)), PlanError, "cut more"),
    Refusal(
        "a width of 7.5, by Python",
        by_python({**gohsp.describe(tiny()).widths, "blocks.1.mlp": gohsp.FfnWidths(units=7.5)}),  # type: ignore[arg-type]
        PlanError,
        "'units' must be a whole number, got 7.5",
    ),
    Refusal(
        "widths that are to be uniform, and are given",
        lambda folder: gohsp.run(
            tiny(),
            "digits",
            "params=-1%",
            folder / "run",
            widths=WHOLE,
            config=gohsp.Config(uniform=True),  # type: ignore[arg-type]
        ),
        PlanError,
        "uniform chooses the widths of all blocks, and widths are given; leave one of them out",
    ),
    Refusal("tables for widths, by Python", by_python(WHOLE), PlanError, "must have AttentionWidths"),
    Refusal("something to exclude that is not there", excluded("blocks.7"), PlanError, "'blocks.0' to 'blocks.1'"),
    Refusal(
        "a text in place of a list of what to exclude",
        lambda folder: gohsp.run(tiny(), "digits", "params=-1%", folder / "run", exclude="qk"),
        PlanError,
        "write ['qk']",
    ),
)
