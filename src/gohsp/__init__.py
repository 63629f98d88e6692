"""gohsp makes trained Vision Transformers smaller and faster by structured pruning.

The public names; everything else is an implementation detail. See the README for the ten lines that prune a model.
"""

from importlib.metadata import version as _version

from gohsp.checkpoint import load, save
from gohsp.core import admm
from gohsp.core.admm import AdmmSettings
from gohsp.core.allocation import WidthSettings
from gohsp.core.compensation import collect_moments
from gohsp.core.projection import ProjectionSettings
from gohsp.core.ranking import HeadRanking, RankingSettings, rank_heads
from gohsp.core.rotation import rotate
from gohsp.data import DataSource
from gohsp.errors import GohspError
from gohsp.models import Compaction, compact, describe
from gohsp.opening import open_model
from gohsp.pipeline import Result, prune
from gohsp.recipe import Recipe
from gohsp.structure import BlockPlan, BlockShape, Budget, ModelStructure, Plan, model_cost, parse_budget
from gohsp.training import StageSettings, TrainingSettings

__version__ = _version("gohsp")

__all__ = [
    "AdmmSettings",
    "BlockPlan",
    "BlockShape",
    "Budget",
    "Compaction",
    "DataSource",
    "GohspError",
    "HeadRanking",
    "ModelStructure",
    "Plan",
    "ProjectionSettings",
    "RankingSettings",
    "Recipe",
    "Result",
    "StageSettings",
    "TrainingSettings",
    "WidthSettings",
    "admm",
    "collect_moments",
    "compact",
    "describe",
    "load",
    "model_cost",
    "open_model",
    "parse_budget",
    "prune",
    "rank_heads",
    "rotate",
    "save",
]
