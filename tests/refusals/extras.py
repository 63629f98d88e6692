"""Extras that are needed and not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

import gohsp
from gohsp import data, report
from gohsp.errors import ConfigError, MissingPackageError
from refusals import Refusal

TITLE = "Extras"

Act = Callable[[Path], object]
TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}
MODEL: Any = timm.create_model("vit_tiny_patch16_224", **TINY)


def refusal(given: str, package: str, act: Act, extra: str) -> Refusal:
    """A case without a package."""

    def without(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            act(folder)

    return Refusal(f"{given} without {package}", without, MissingPackageError, f"pip install 'gohsp[{extra}]'")


CASES = (
    refusal("a model by a name of timm's", "timm", lambda _: gohsp.open_model("vit_tiny_patch16_224"), "timm"),
    refusal("a model by a name of torchvision's", "torchvision", lambda _: gohsp.open_model("torchvision:vit_b_16"),
            "torchvision"),
    refusal("training", "timm", lambda _: gohsp.prune(MODEL, [], "params=-20%", method="finetune"), "train"),
    refusal("a model on the hub", "huggingface_hub", lambda _: gohsp.load("me/small"), "hub"),
    refusal("an upload", "huggingface_hub", lambda folder: gohsp.push_to_hub(folder, "me/small"), "hub"),
    refusal("images that are to be prepared", "timm", lambda _: data.Preprocessing.from_model(MODEL), "timm"),
    refusal("digits", "sklearn", lambda _: data.open_split(gohsp.DataSource(source="digits"), "train"), "cli"),
    refusal("a data set of Hugging Face", "datasets",
            lambda _: data.open_split(gohsp.DataSource(source="hfds/me/images"), "train"), "hf"),
    refusal("a report's page", "matplotlib", lambda folder: report.write(object(), folder), "report"),  # type: ignore[arg-type]
    refusal("trackers", "accelerate", lambda _: gohsp.tracking(["wandb"]).__enter__(), "train"),
    Refusal("a tracker that nobody has", lambda _: gohsp.tracking(["wandbb"]).__enter__(), ConfigError, "'wandbb'"),
)  # fmt: skip
