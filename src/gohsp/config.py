"""Settings: everything that pruning can be told, as nested frozen dataclasses, read from and written to TOML."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from gohsp.core.admm import AdmmSettings, Penalty
from gohsp.core.allocation import WidthSettings
from gohsp.core.healing import HealSettings
from gohsp.core.projection import Metric, RepairSettings
from gohsp.core.ranking import RankingSettings
from gohsp.errors import ConfigError, nearest
from gohsp.settings import NOT_NEGATIVE, POSITIVE, SEED, SHARE, WORKERS, Range, require_settings, whole

T = TypeVar("T")
Method = Literal["oneshot", "finetune", "gohsp"]
METHODS: tuple[Method, ...] = ("oneshot", "finetune", "gohsp")
Dtype = Literal["float32", "bfloat16", "float16"]
"""Data types that models are timed in."""

BATCH_SIZE, ROUNDS = whole(1, 2**16), whole(1, 10_000)
"""Of what is timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSettings:
    """Images that models are pruned on; no label is read.

    Attributes:
        images: Images for statistics and repairs. Four times as many as the model has channels, or more, are best.
        holdout: Further ones, on which the result is compared with the dense model; where there are fewer than both,
            what is left, and a twentieth at least.
        mirror: Whether repairs see the mirror images of these, too; a run never does where mirroring changes a class.
    """

    images: int = 1024
    holdout: int = 128
    mirror: bool = True

    def __post_init__(self) -> None:
        require_settings(self, "calibration", images=whole(), holdout=whole())


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Which images of a source a run uses for what.

    Attributes:
        train_split: Trained on, and calibrated on.
        validation_split: Scored on, nothing else.
        image_key: Column of the images, if it cannot be told.
        label_key: Column of the labels, if it cannot be told.
        shown: Held-out images that the report shows; 0 keeps all images out of it, where they must not be passed on.
        strict: Whether one unreadable image ends the run; otherwise it is left out and counted.
        resident: Whether training and validation images stay, decoded and cropped, on the training device and are
            augmented there: for many small images. Then ``training.augment`` is ``none`` or ``light``.
    """

    train_split: str = "train"
    validation_split: str = "validation"
    image_key: str | None = None
    label_key: str | None = None
    shown: int = 3
    strict: bool = False
    resident: bool = False

    def __post_init__(self) -> None:
        require_settings(self, "data", shown=whole(0, 8))
        for name in ("train_split", "validation_split"):
            if not getattr(self, name).strip():
                raise ConfigError(f"data.{name} must name a split, such as 'train', got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySettings:
    """How time is measured, always on the device that prunes.

    Attributes:
        batch_size: Images a batch.
        dtype: Data type of weights and images.
        rounds: How often each contestant is timed; the median counts.
    """

    batch_size: int = 1
    dtype: Dtype = "float32"
    rounds: int = 21

    def __post_init__(self) -> None:
        require_settings(self, "latency", batch_size=BATCH_SIZE, rounds=ROUNDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSettings:
    """Length and rate of a training stage, whose rate falls along a cosine to 1 % of its peak.

    Attributes:
        epochs: Passes over the training images; 0 leaves the stage out.
        learning_rate: Peak rate.
        warmup: Epochs of linear warm-up.
    """

    epochs: int = 0
    learning_rate: float = 2e-4
    warmup: float = 0.2

    def check(self, name: str) -> None:
        """Check every setting; ``name`` is the stage's, by which a file of settings writes them.

        Raises:
            ConfigError: One is out of range.
        """
        require_settings(self, name, epochs=whole(0), learning_rate=POSITIVE, warmup=Range(0, 1e6))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmmStage:
    """The stage of method ``gohsp`` in which the network trains while ADMM pulls it towards the cut.

    Attributes:
        epochs: Passes over the training images.
        learning_rate: Its rate, constant after ``warmup`` epochs.
        warmup: Epochs of linear warm-up.
        metric: Of the projection: the ``data``'s, or that of the weights, where units are compared by ``activation`` or
            by ``norm``.
        penalty: ``decoupled`` moves weights by the fraction ``rho`` after each optimiser step, as AdamW decays them;
            ``coupled`` adds the penalty to the gradients before it.
        rho_start: Penalty at the start.
        rho_end: Penalty after 60 % of the stage; in between it grows geometrically.
        interval: Optimiser steps between two Z-steps.
    """

    epochs: int = 2
    learning_rate: float = 2e-4
    warmup: float = 0.2
    metric: Metric = "data"
    penalty: Penalty = "decoupled"
    rho_start: float = 0.01
    rho_end: float = 0.1
    interval: int = 8

    def __post_init__(self) -> None:
        self.stage.check("admm")
        self.settings  # noqa: B018 (made once, and so checked)

    @property
    def stage(self) -> StageSettings:
        """Length and rate."""
        return StageSettings(epochs=self.epochs, learning_rate=self.learning_rate, warmup=self.warmup)

    @property
    def settings(self) -> AdmmSettings:
        """Penalty, schedule and metric."""
        return AdmmSettings(
            metric=self.metric,
            penalty=self.penalty,
            rho_start=self.rho_start,
            rho_end=self.rho_end,
            interval=self.interval,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """What all training stages have in common.

    Attributes:
        batch_size: Images a step.
        optimizer: A timm optimiser's name.
        weight_decay: Its weight decay.
        clip_grad: Largest gradient norm; 0 for no limit.
        label_smoothing: Share of the target spread over all classes.
        distillation: Share of the loss that is the divergence from the dense model's predictions (0: labels only).
        mixup: timm's mixup alpha; 0 for none.
        cutmix: timm's cutmix alpha; 0 for none.
        augment: Augmentation of training images: none, light or strong.
        workers: Processes that read images.
        compile: Whether to train through ``torch.compile``; it takes a minute a stage before it pays.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
    """

    batch_size: int = 64
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    label_smoothing: float = 0.1
    distillation: float = 0.5
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: Literal["none", "light", "strong"] = "light"
    workers: int = 0
    compile: bool = False
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        require_settings(
            self,
            "training",
            batch_size=whole(),
            weight_decay=NOT_NEGATIVE,
            clip_grad=NOT_NEGATIVE,
            label_smoothing=SHARE,
            distillation=SHARE,
            mixup=Range(0, 100),
            cutmix=Range(0, 100),
            workers=WORKERS,
            evaluate_every=whole(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings; the defaults suit most models.

    Attributes:
        method: ``oneshot`` ranks, allocates, cuts and repairs: a thousand unlabelled images, minutes. ``finetune``
            trains the result, with labels. ``gohsp``, the paper's, trains with ADMM's pull before the cut, too.
        at: Name of the module that is pruned, such as ``vision_model``; empty for all of the model. The rest stays as
            it is, and counts in the budget.
        uniform: Whether all blocks get one width of each kind, as far as settings of the model's library can say it, so
            that the library makes the pruned model without gohsp; what they cannot say is not cut.
        seed: Of everything that is drawn; 0 to 4,294,967,295.
        device: Of a run; ``cpu`` to stay off an accelerator that is there.
        precision: Mixed precision of passes; auto takes bf16 where the device is faster in it.
        model_arguments: Arguments of ``timm.create_model`` for a model that a run is given by name.
        compare_dense: Whether a run trains the dense model for as many epochs, for an honest comparison.
        calibration: Unlabelled images.
        data: Splits of a run's images.
        ranking: Heads' graph, chain and baselines.
        widths: Allowed widths.
        repair: How units are chosen and repaired.
        heal: Tuning of the blocks after a one-shot cut, without labels.
        latency: How time is measured, for latency budgets and for the report.
        dense: Training of the dense model on a run's data before anything else; 0 epochs where it is trained.
        admm: The ADMM stage of method ``gohsp``.
        finetune: Fine-tuning after the cut.
        training: What all training stages have in common.
    """

    method: Method = "oneshot"
    at: str = ""
    uniform: bool = False
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    model_arguments: dict[str, Any] = field(default_factory=dict)
    compare_dense: bool = True
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    data: DataSettings = field(default_factory=DataSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    widths: WidthSettings = field(default_factory=WidthSettings)
    repair: RepairSettings = field(default_factory=RepairSettings)
    heal: HealSettings = field(default_factory=HealSettings)
    latency: LatencySettings = field(default_factory=LatencySettings)
    dense: StageSettings = field(default_factory=StageSettings)
    admm: AdmmStage = field(default_factory=AdmmStage)
    finetune: StageSettings = field(default_factory=lambda: StageSettings(epochs=8))
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @property
    def trains(self) -> bool:
        """Whether the method trains with labels."""
        return self.method != "oneshot"

    def __post_init__(self) -> None:
        require_settings(self, "", seed=SEED)
        for stage in ("dense", "finetune"):
            getattr(self, stage).check(stage)
        if not self.trains and self.dense.epochs > 0:
            raise ConfigError(
                f'method = "oneshot" trains no dense model, but dense.epochs is {self.dense.epochs}; give a trained '
                'model and epochs = 0, or take method = "finetune"'
            )
        if self.uniform and self.widths.depth:
            raise ConfigError(
                "uniform = true keeps every sub-layer, and widths.depth lets whole ones go; set one of them to false"
            )
        if self.data.resident and self.training.augment == "strong":
            raise ConfigError(
                'data.resident images are augmented on the device, which knows training.augment = "none" and "light", '
                'not "strong"; choose one of these, or set data.resident = false'
            )
        if self.trains and self.heal.epochs > 0:
            raise ConfigError(
                f'heal.epochs is {self.heal.epochs}, but method = "{self.method}" fine-tunes instead; set it to 0, or '
                'take method = "oneshot"'
            )
        if self.method == "gohsp" and self.admm.epochs == 0:
            raise ConfigError(
                'method = "gohsp" needs admm.epochs of 1 or more; method = "finetune" is the same without'
            )


MOVED = {
    "route": 'method: "oneshot", "finetune" or "gohsp"',
    "allocation": "nothing: widths are chosen by damage curves, and alike in all blocks where uniform is true",
    "allocation_stages": "widths.stages",
    "retrain_dense": "compare_dense",
    "polish": "heal",
    "admm_stage": "admm, whose epochs, learning_rate and warmup they are now",
    "data.calibration_images": "calibration.images",
    "data.holdout_images": "calibration.holdout",
    "data.mirror": "calibration.mirror",
    "data.allocation_images": "nothing: their number is fixed",
    "data.ranking_images": "nothing: their number is fixed",
    "admm.projection": "repair (guidance, ridge) and admm.metric",
    "training.precision": "precision",
    "training.temperature": "nothing: it is 1",
    "training.ema": "nothing: weights are not averaged",
    "ranking.tolerance": "nothing: it is fixed",
}
"""Keys of the first edition's recipes, and what takes their place."""


def from_mapping(data: Mapping[str, Any], *, where: str = "config") -> Config:
    """Build settings from nested plain data; what is left out keeps its default.

    Raises:
        ConfigError: An unknown key (the nearest valid one is named), a wrong type, or a value out of range.
    """
    try:
        return _changed(Config(), data, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _changed(settings: T, data: Mapping[str, Any], prefix: str) -> T:
    """``settings`` with the values of ``data``, which is nested as they are."""
    present = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    changes = dict(data)
    for key, value in data.items():
        if instead := MOVED.get(f"{prefix}{key}"):
            raise ConfigError(f"'{prefix}{key}' was a key of gohsp 0.1; its place is taken by {instead}")
        if key not in present:
            raise ConfigError(f"unknown key '{prefix}{key}'; {nearest(key, present)}")
        if dataclasses.is_dataclass(present[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{key} must be a table, got {value!r}")
            changes[key] = _changed(present[key], value, f"{prefix}{key}.")
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def settled(config: object) -> Config:
    """The settings that a caller gave, or the defaults for None.

    Raises:
        ConfigError: Something else than a :class:`Config`.
    """
    if config is None:
        return Config()
    if not isinstance(config, Config):
        raise ConfigError(
            f"config must be a gohsp.Config, got a {type(config).__name__}; make it by gohsp.Config(...), or of a "
            "table by gohsp.config.from_mapping(table)"
        )
    return config


def read(path: Path) -> Config:
    """Read settings in TOML.

    Raises:
        ConfigError: No such file, no TOML, or what :func:`from_mapping` refuses.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"settings '{path}' does not exist") from error
    except (OSError, ValueError, RecursionError) as error:  # no TOML, no UTF-8, or nested beyond reason
        raise ConfigError(f"settings '{path}' is no TOML: {error}") from error
    return from_mapping(data, where=f"settings '{path}'")


def to_mapping(config: Config) -> dict[str, Any]:
    """Nested plain data; entries that are None are left out, as TOML has no word for it."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_none(v) for k, v in value.items() if v is not None}
        return value

    return without_none(dataclasses.asdict(config))


def to_toml(config: Config) -> str:
    """The settings as TOML, every setting written out."""
    import tomli_w  # only runs write settings

    return tomli_w.dumps(to_mapping(config))
