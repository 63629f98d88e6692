"""Recipes: everything that a run can be told, as nested frozen dataclasses, read from and written to TOML."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from gohsp.core.admm import AdmmSettings
from gohsp.core.allocation import WidthSettings
from gohsp.core.ranking import RankingSettings
from gohsp.errors import RecipeError, nearest
from gohsp.latency import LatencySettings
from gohsp.polish import PolishSettings
from gohsp.settings import SEED, require_settings, whole
from gohsp.training import StageSettings, TrainingSettings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images are used for what.

    Attributes:
        train_split: Trained on, and calibrated on.
        validation_split: Scored on, nothing else.
        image_key: Column of the images, if it cannot be told.
        label_key: Column of the labels, if it cannot be told.
        strict: Whether one unreadable image ends the run; otherwise it is left out and counted.
        resident: Whether training and validation images stay, decoded and cropped, on the training device and are
            augmented there: for many small images. Then ``training.augment`` is ``none`` or ``light``.
        calibration_images: Unlabelled training images for statistics and repairs.
        mirror: Whether repairs see the mirror images of these, too; never where mirroring changes a class.
        allocation_images: How many of these the damage curves are measured on.
        ranking_images: How many of these heads are ranked and tokens weighed on.
        holdout_images: Further unlabelled training images, on which the cut model is compared with the dense one.
    """

    train_split: str = "train"
    validation_split: str = "validation"
    image_key: str | None = None
    label_key: str | None = None
    strict: bool = False
    resident: bool = False
    calibration_images: int = 1024
    mirror: bool = True
    allocation_images: int = 128
    ranking_images: int = 256
    holdout_images: int = 128

    def __post_init__(self) -> None:
        counts = ("calibration_images", "allocation_images", "ranking_images", "holdout_images")
        require_settings(self, "data", **dict.fromkeys(counts, whole()))
        for name in ("train_split", "validation_split"):
            if not getattr(self, name).strip():
                raise RecipeError(f"data.{name} must name a split, such as 'train', got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        route: ``train``: ADMM, where it is asked for, and fine-tuning; ``oneshot``: closed-form repair alone, which
            reads no label and takes minutes. Of the settings of training, ``dense`` to ``retrain_dense``, it uses
            ADMM's projection and the precision.
        seed: Of everything that is drawn; 0 to 2,147,483,647.
        device: ``cpu`` to stay off an accelerator that is there.
        model_arguments: Arguments of ``timm.create_model`` for a model given by name.
        allocation: ``measured``: damage curves and a knapsack; ``uniform``: the same share everywhere.
        allocation_stages: How often damage curves are measured on the way to the budget, each time on the network as
            cut and repaired so far; each costs about as much as the first and a cut. None takes one for every 27 %
            of the parameters that go: 1 for a cut by a third, 2 by a half, 3 by 60 %.
        data: Images.
        ranking: Heads' graph, chain and baselines.
        widths: Allowed widths.
        latency: How time is measured, for latency budgets and for the report.
        polish: Tuning of the blocks after a one-shot cut.
        dense: Training of the dense model on this data before anything else; 0 epochs where it is trained.
        admm: Penalty, schedule and metric.
        admm_stage: Length and rate of the ADMM stage. 0 epochs, the default, cut and repair at once: with the same
            epochs in all that measured as good or better (``docs/admm.md``).
        finetune: Fine-tuning after the cut.
        training: What all stages have in common.
        retrain_dense: Whether to train the dense model for as many epochs, for an honest comparison.
    """

    route: Literal["train", "oneshot"] = "train"
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    model_arguments: dict[str, Any] = field(default_factory=dict)
    allocation: Literal["measured", "uniform"] = "measured"
    allocation_stages: int | None = None
    data: DataSettings = field(default_factory=DataSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    widths: WidthSettings = field(default_factory=WidthSettings)
    latency: LatencySettings = field(default_factory=LatencySettings)
    polish: PolishSettings = field(default_factory=PolishSettings)
    dense: StageSettings = field(default_factory=StageSettings)
    admm: AdmmSettings = field(default_factory=AdmmSettings)
    admm_stage: StageSettings = field(default_factory=lambda: StageSettings(schedule="constant"))
    finetune: StageSettings = field(default_factory=lambda: StageSettings(epochs=8))
    training: TrainingSettings = field(default_factory=TrainingSettings)
    retrain_dense: bool = True

    def __post_init__(self) -> None:
        require_settings(self, "", seed=SEED, allocation_stages=whole(1, 100))
        for stage in ("dense", "admm_stage", "finetune"):
            getattr(self, stage).check(stage)
        if self.route == "oneshot" and self.dense.epochs > 0:
            raise RecipeError(
                'route = "oneshot" trains no dense model, but dense.epochs is '
                f'{self.dense.epochs}; give a trained model and epochs = 0, or take route = "train"'
            )
        if self.allocation == "uniform" and (self.allocation_stages or 1) > 1:
            raise RecipeError(
                f'allocation_stages is {self.allocation_stages} with allocation = "uniform", which takes one; leave it '
                'out, or take allocation = "measured"'
            )
        if self.data.resident and self.training.augment == "strong":
            raise RecipeError(
                'data.resident images are augmented on the device, which knows training.augment = "none" and "light", '
                'not "strong"; choose one of these, or set data.resident = false'
            )
        if self.route == "train" and self.polish.epochs > 0:
            raise RecipeError(
                f'polish.epochs is {self.polish.epochs}, but route = "train" fine-tunes instead; set it to 0, or take '
                'route = "oneshot"'
            )


def from_mapping(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from nested plain data; what is left out keeps its default.

    Raises:
        RecipeError: An unknown key (the nearest valid one is named), a wrong type, or a value out of range.
    """
    try:
        return _changed(Recipe(), data, "")
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _changed(settings: T, data: Mapping[str, Any], prefix: str) -> T:
    """``settings`` with the values of ``data``, which is nested as they are."""
    present = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    changes = dict(data)
    for key, value in data.items():
        if key not in present:
            raise RecipeError(f"unknown key '{prefix}{key}'; {nearest(key, present)}")
        if dataclasses.is_dataclass(present[key]):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{prefix}{key} must be a table, got {value!r}")
            changes[key] = _changed(present[key], value, f"{prefix}{key}.")
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def read(path: Path) -> Recipe:
    """Read a TOML recipe.

    Raises:
        RecipeError: No such file, no TOML, or what :func:`from_mapping` refuses.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"recipe '{path}' does not exist") from error
    except (OSError, ValueError, RecursionError) as error:  # no TOML, no UTF-8, or nested beyond reason
        raise RecipeError(f"recipe '{path}' is no TOML: {error}") from error
    return from_mapping(data, where=f"recipe '{path}'")


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Nested plain data; entries that are None are left out, as TOML has no word for it."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_none(v) for k, v in value.items() if v is not None}
        return value

    return without_none(dataclasses.asdict(recipe))


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every setting written out."""
    return tomli_w.dumps(to_mapping(recipe))
