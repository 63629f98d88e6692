"""Settings that mean nothing, by a settings file, by Python or by a flag; each is refused before anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import tomli_w
from torch import nn

import gohsp
from gohsp import config
from gohsp.config import StageSettings
from gohsp.core.allocation import WidthSettings
from gohsp.errors import ConfigError
from refusals import Refusal

TITLE = "Settings"


def written(key: str, value: Any) -> Callable[[Path], object]:
    """Read a file that sets ``key``, such as ``training.mixup``, to ``value``."""
    table: dict[str, Any] = {key.rpartition(".")[2]: value}
    for part in reversed(key.split(".")[:-1]):
        table = {part: table}

    def act(folder: Path) -> object:
        (folder / "settings.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        return config.read(folder / "settings.toml")

    return act


def setting(key: str, value: Any, says: str) -> Refusal:
    """``key`` set to ``value`` in a file."""
    return Refusal(f"`{key} = {tomli_w.dumps({'': value})[5:].strip()}`", written(key, value), ConfigError, says)


def above_the_model(**widths: int) -> Callable[[Path], object]:
    """Prune a model of 4 heads of 8 dimensions and 64 hidden units under such widths."""

    def act(folder: Path) -> object:
        size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
        model = timm.create_model("vit_tiny_patch16_224", **size, mlp_ratio=2, num_classes=10)
        settings = gohsp.Config(widths=WidthSettings(**widths))
        try:
            return gohsp.run(model, "digits", "params=-30%", folder / "run", config=settings)
        finally:
            assert not (folder / "run").exists()

    return act


CASES = (
    Refusal(
        "a table in place of a Config",
        lambda _: gohsp.prune(nn.Identity(), [], "params=-30%", config={"seed": 1}),  # type: ignore[arg-type]
        ConfigError,
        "gohsp.config.from_mapping(table)",
    ),
    setting("seed", -1, "seed must be a whole number of at least 0"),
    setting("seed", 2**32, "at most 4294967295, got 4294967296"),
    setting("seed", True, "seed must be a whole number"),
    setting("method", "one-shot", "method 'one-shot' is unknown; did you mean 'oneshot'?"),
    setting("calibration.images", 0, "calibration.images must be a whole number of at least 1, got 0"),
    setting("data.strict", "no", "data.strict must be true or false, got 'no'"),
    setting("ranking.damping", math.nan, "ranking.damping must be a finite number of at least 0 and at most 1"),
    setting("ranking.edge", "jds", "ranking.edge 'jds' is unknown; did you mean 'jsd'?"),
    setting("widths.multiple", 0, "widths.multiple must be a whole number of at least 1"),
    setting("widths.stages", 0, "widths.stages must be a whole number of at least 1"),
    setting("uniform", "yes", "uniform must be true or false, got 'yes'"),
    Refusal(
        "`uniform` with `widths.depth`",
        lambda _: gohsp.Config(uniform=True, widths=WidthSettings(depth=True)),
        ConfigError,
        "uniform = true keeps every sub-layer",
    ),
    setting("widths.min_ffn", 1.5, "at most 1, got 1.5"),
    setting("latency.batch_size", 10**9, "latency.batch_size"),
    setting("latency.dtype", "int8", "latency.dtype 'int8' is unknown"),
    setting("heal.epochs", -1, "heal.epochs must be a whole number of at least 0, got -1"),
    setting("heal.learning_rate", math.inf, "heal.learning_rate must be a finite number above 0, got inf"),
    setting("repair.ridge", math.nan, "repair.ridge must be a finite number above 0, got nan"),
    setting("repair.guidance", 1.5, "repair.guidance must be a finite number of at least 0 and at most 1, got 1.5"),
    setting("dense.warmup", math.nan, "dense.warmup"),
    setting("admm.epochs", -1, "admm.epochs must be a whole number of at least 0, got -1"),
    setting("finetune.learning_rate", 0.0, "finetune.learning_rate must be a finite number above 0, got 0.0"),
    setting("admm.metric", "euclidean", "admm.metric 'euclidean' is unknown"),
    setting("admm.interval", 0, "admm.interval must be a whole number of at least 1, got 0"),
    setting("admm.rho_start", 0.5, "admm.rho_start must be at most admm.rho_end, got 0.5 and 0.1"),
    setting("admm.rho_end", 2.0, "admm.rho_end is a fraction when the penalty is decoupled, at most 1; got 2.0"),
    setting("training.batch_size", 1.5, "training.batch_size must be a whole number of at least 1, got 1.5"),
    setting("training.weight_decay", -0.1, "training.weight_decay must be a finite number of at least 0, got -0.1"),
    setting("training.clip_grad", -1.0, "training.clip_grad"),
    setting("training.mixup", -0.2, "training.mixup"),
    setting("training.cutmix", math.nan, "training.cutmix"),
    setting("training.workers", 10**6, "training.workers must be a whole number of at least 0 and at most 1024"),
    setting("route", "train", "'route' was a key of gohsp 0.1; its place is taken by method"),
    setting("training.ema", 0.9, "'training.ema' was a key of gohsp 0.1"),
    setting("admm.projection", {"ridge": 1.0}, "its place is taken by repair (guidance, ridge) and admm.metric"),
    Refusal(
        "a stage of -1 epochs, by Python",
        lambda _: gohsp.Config(finetune=StageSettings(epochs=-1)),
        ConfigError,
        "finetune.epochs must be a whole number of at least 0, got -1",
    ),
    Refusal(
        "a table where settings belong, by Python",
        lambda _: gohsp.Config(training={"batch_size": 8}),  # type: ignore[arg-type]
        ConfigError,
        "training must be a TrainingSettings",
    ),
    Refusal(
        "`widths.min_width` above the heads' width",
        above_the_model(min_width=16),
        ConfigError,
        "widths.min_width is 16, but 8 is the most that a sub-layer of this model has (qk, vo)",
    ),
    Refusal("`widths.min_heads` above the heads", above_the_model(min_heads=5), ConfigError, "give at most 4"),
    Refusal("`widths.multiple` above every width", above_the_model(multiple=65), ConfigError, "give at most 64"),
)
