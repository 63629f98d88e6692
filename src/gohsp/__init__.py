"""gohsp makes trained Vision Transformers smaller and faster by structured pruning.

The public names, each imported when it is first used. Public, too, are the modules ``gohsp.benchmark``, ``config``,
``data``, ``evaluation``, ``latency``, ``report``, ``runs`` and ``structure``; everything else is an implementation
detail. Three lines prune a model in memory::

    result = gohsp.prune(model, images, "params=-40%")
    gohsp.save(result.model, "small")
    model = gohsp.load("small")
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gohsp.api import CutModel, Pruned, allocate, cut, finetune, heal, measure_curves, prune, rank
    from gohsp.benchmark import Benchmark, bench
    from gohsp.checkpoint import apply, load, save
    from gohsp.config import Config
    from gohsp.core import admm
    from gohsp.core.admm import AdmmSettings
    from gohsp.core.allocation import DamageCurve
    from gohsp.core.moments import collect_moments
    from gohsp.core.objective import Objective, classification, features
    from gohsp.core.ranking import HeadRanking
    from gohsp.data.sources import DataSource
    from gohsp.errors import GohspError
    from gohsp.exporting import Exported, export
    from gohsp.hub import model_card, push_to_hub
    from gohsp.models import Compaction, compact, describe, families, save_plain
    from gohsp.opening import open_model
    from gohsp.runs import RunResult, run
    from gohsp.runtime import Progress
    from gohsp.structure import (
        AttentionKept,
        AttentionWidths,
        FfnKept,
        FfnWidths,
        Network,
        count_macs,
        count_params,
    )
    from gohsp.trackers import tracking

_HOMES = {
    "api": ("CutModel", "Pruned", "allocate", "cut", "finetune", "heal", "measure_curves", "prune", "rank"),
    "benchmark": ("Benchmark", "bench"),
    "checkpoint": ("apply", "load", "save"),
    "config": ("Config",),
    "core": ("admm",),
    "core.admm": ("AdmmSettings",),
    "core.allocation": ("DamageCurve",),
    "core.moments": ("collect_moments",),
    "core.objective": ("Objective", "classification", "features"),
    "core.ranking": ("HeadRanking",),
    "data.sources": ("DataSource",),
    "errors": ("GohspError",),
    "exporting": ("Exported", "export"),
    "hub": ("model_card", "push_to_hub"),
    "models": ("Compaction", "compact", "describe", "families", "save_plain"),
    "opening": ("open_model",),
    "runs": ("RunResult", "run"),
    "runtime": ("Progress",),
    "structure": (
        "AttentionKept",
        "AttentionWidths",
        "FfnKept",
        "FfnWidths",
        "Network",
        "count_macs",
        "count_params",
    ),
    "trackers": ("tracking",),
}
"""The public names by the module that each is defined in."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = _version("gohsp")

__all__ = [
    "AdmmSettings",
    "AttentionKept",
    "AttentionWidths",
    "Benchmark",
    "Compaction",
    "Config",
    "CutModel",
    "DamageCurve",
    "DataSource",
    "Exported",
    "FfnKept",
    "FfnWidths",
    "GohspError",
    "HeadRanking",
    "Network",
    "Objective",
    "Progress",
    "Pruned",
    "RunResult",
    "admm",
    "allocate",
    "apply",
    "bench",
    "classification",
    "collect_moments",
    "compact",
    "count_macs",
    "count_params",
    "cut",
    "describe",
    "export",
    "families",
    "features",
    "finetune",
    "heal",
    "load",
    "measure_curves",
    "model_card",
    "open_model",
    "prune",
    "push_to_hub",
    "rank",
    "run",
    "save",
    "save_plain",
    "tracking",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gohsp' has no attribute '{name}'")
    module = importlib.import_module(f"gohsp.{_HOME[name]}")
    of_modules = {"admm": "gohsp.core.admm", "families": "gohsp.models.families"}  # which are modules themselves
    found = importlib.import_module(of_modules[name]) if name in of_modules else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
