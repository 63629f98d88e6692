"""The report as a validated model, schema version 4; ``docs/report.md`` is the same in prose, key by key with units.

Every level can be built from keywords, from plain JSON data, or from an object with attributes of the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from gohsp.errors import PlanError, RunError, nearest
from gohsp.structure import (
    AttentionKept,
    AttentionWidths,
    BudgetKind,
    FfnKept,
    FfnWidths,
    SublayerKept,
    SublayerWidths,
    check_indices,
    is_absent,
    kept_from_json,
    kept_to_json,
    widths_from_json,
    widths_to_json,
)

SCHEMA_VERSION = 4
FIRST_EDITION = (1, 2, 3)
"""Versions that only gohsp 0.1 reads."""

# A chain's rows are written in float64 after a float64 normalisation; float32 input costs 1e-6.
_ROW_SUM_TOLERANCE = 1e-4
_SHOWN_PROBLEMS = 5

T = TypeVar("T")


def _is_utc(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError(f"'{text}' is not in UTC: end it with 'Z' or '+00:00'")
    return text


def _checked(check: Callable[..., T], *given: Any) -> T:
    """What ``check`` returns; its refusal becomes one that pydantic collects with the others."""
    try:
        return check(*given)
    except PlanError as error:
        raise ValueError(str(error)) from error


def _widths(given: Any) -> dict[str, SublayerWidths]:
    return _typed(given, (AttentionWidths, FfnWidths), widths_from_json)


def _kept(given: Any) -> dict[str, SublayerKept]:
    return _typed(given, (AttentionKept, FfnKept), kept_from_json)


def _typed(given: Any, types: tuple[type, ...], from_json: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The table itself where it is typed already, or what its plain data stand for."""
    if isinstance(given, Mapping) and all(isinstance(value, types) for value in given.values()):
        return dict(given)
    return _checked(from_json, given)


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A list, as JSON has it, or a tuple."""
FreeDict = dict[str, JsonValue]
Picture = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
"""A WebP file in Base64."""

WidthsTable = Annotated[dict[str, SublayerWidths], PlainValidator(_widths), PlainSerializer(widths_to_json)]
KeptTable = Annotated[dict[str, SublayerKept], PlainValidator(_kept), PlainSerializer(kept_to_json)]


class _Level(BaseModel):
    """One level of the report: exact types, finite numbers, no key that is not declared."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, from_attributes=True)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, given: Any) -> Any:
        for key in given if isinstance(given, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key '{key}', {nearest(str(key), cls.model_fields)}")
        return given


class Machine(_Level):
    """Where the run took place."""

    device: str
    processor: str
    cores: Positive
    python: str


class Model(_Level):
    """The dense model, as its library builds it; a model of the user's own has a class name and no library."""

    library: str | None = None
    architecture: str
    arguments: FreeDict = {}


class Data(_Level):
    """The images that calibrated, trained and scored the models; the one-shot method only calibrates."""

    source: str
    train_split: str
    image_size: Positive
    classes: Positive | None = None
    class_names: Many[str] | None = None
    calibration_images: Positive | None = None
    validation_split: str | None = None
    train_images: Count | None = None
    validation_images: Count | None = None
    unreadable_images: Count = 0

    @model_validator(mode="after")
    def _one_name_a_class(self) -> Self:
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.classes or 'no'} classes")
        return self


class Budget(_Level):
    """The bound that was asked for, and what the pruned model takes; of a latency budget, milliseconds a batch."""

    kind: BudgetKind
    requested: str
    limit: Positive | AboveZero
    achieved: Positive | AboveZero

    @model_validator(mode="after")
    def _counts_are_whole(self) -> Self:
        if self.kind != "latency" and not (isinstance(self.limit, int) and isinstance(self.achieved, int)):
            raise ValueError(f"limit and achieved of a {self.kind} budget are whole numbers")
        return self


class Speed(_Level):
    """Median time of a batch, dense and pruned model taking turns on the run's device."""

    batch_size: Positive
    dtype: str
    dense_ms: AboveZero
    pruned_ms: AboveZero


class Metrics(_Level):
    """Size and validation scores of one model; ``n`` images were scored. Without labels there are no scores."""

    params: Positive
    macs: Positive
    top1: Percent | None = None
    top5: Percent | None = None
    loss: NonNegative | None = None
    n: Positive | None = None

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        scores = (self.top1, self.top5, self.loss, self.n)
        if None in scores and any(score is not None for score in scores):
            raise ValueError("give all of top1, top5, loss and n, or none of them")
        return self


class Fidelity(_Level):
    """The cut model against the dense one, before any fine-tuning, on images that nothing was measured on.

    ``distance`` is the objective's mean distance of their outputs: nats of divergence for ``classification``, half the
    mean squared error over the outputs' variance for ``features``. ``predicted_distance`` is what the damage curves
    foresaw (None without them), ``agreement`` the share of images with the same first prediction (None without
    classes).
    """

    objective: str
    images: Positive
    distance: NonNegative
    predicted_distance: NonNegative | None = None
    agreement: Percent | None = None

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        if (self.objective == "classification") != (self.agreement is not None):
            raise ValueError("agreement is there for the objective 'classification', and for no other")
        return self


class HealStep(_Level):
    """Healing after one more window: relative error on calibration images, distance on held-out ones."""

    blocks: Count
    error: NonNegative | None
    distance: NonNegative


class Heal(_Level):
    """Tuning of blocks after a one-shot cut; ``kept`` is how many windows stayed, first to last."""

    kept: Count
    curve: Many[HealStep]

    @classmethod
    def of(cls, curve: Iterable[Any]) -> Self:
        """From the steps of healing (objects with the attributes of :class:`HealStep`), of which the best stays."""
        steps = tuple(HealStep.model_validate(step) for step in curve)
        return cls(kept=min(steps, key=lambda step: step.distance).blocks, curve=steps)

    @model_validator(mode="after")
    def _kept_is_there(self) -> Self:
        if self.kept not in [step.blocks for step in self.curve]:
            raise ValueError(f"kept names {self.kept} blocks, which curve does not hold")
        return self


class Plan(_Level):
    """Dense and pruned widths and the kept dense indices, by sub-layer; at width 0 a sub-layer is absent.

    ``stages`` is how often damage curves were measured on the way; None where widths came otherwise.
    """

    dense: WidthsTable
    pruned: WidthsTable
    kept: KeptTable
    stages: Positive | None = None

    def kept_heads(self, attention: str) -> tuple[int, ...]:
        """The dense indices of the heads that an attention keeps."""
        kept = self.kept[attention]
        return kept.heads if isinstance(kept, AttentionKept) else ()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not self.dense:
            raise ValueError("dense has no sub-layer")
        for key, table in (("pruned", self.pruned), ("kept", self.kept)):
            if odd := sorted(self.dense.keys() ^ table.keys()):
                raise ValueError(f"dense and {key} differ in {odd}: give every sub-layer in each")
        for name, dense in self.dense.items():
            pruned, kept = self.pruned[name], self.kept[name]
            if not type(dense) is type(pruned) is type(kept.widths):
                raise ValueError(f"'{name}' is an attention in one of dense, pruned and kept, and an FFN in another")
            _checked(check_indices, name, kept, dense)
            if kept.widths != pruned:
                raise ValueError(f"'{name}' keeps indices of {kept.widths}, the pruned widths are {pruned}")
        return self


class Ranking(_Level):
    """The heads' scores, and the Markov chain they come from, by attention."""

    method: str
    edge: str
    scope: Literal["layer", "global"]
    damping: Annotated[float, Field(ge=0, le=1)]
    teleport: str
    scores: Annotated[dict[str, Many[NonNegative]], Field(strict=False)]
    transition: Annotated[dict[str, Many[Many[NonNegative]]], Field(strict=False)]
    iterations: Count
    residual: NonNegative
    images: Count
    notes: Many[str] = ()
    steps: Count = 1
    left_at: Annotated[dict[str, Many[Count]], Field(strict=False)] = {}

    @classmethod
    def of(cls, ranking: Any) -> Self:
        """From a head ranking: a dataclass with these fields, of which ``settings`` holds those that were asked for."""
        content = dataclasses.asdict(ranking)
        return cls(**content.pop("settings"), **content)

    def last_steps(self, attention: str) -> Many[int]:
        """The last step that each of its heads was ranked in; empty where all heads were ranked once."""
        return self.left_at[attention] if self.steps > 1 else ()

    @model_validator(mode="after")
    def _is_chain(self) -> Self:
        if odd := sorted(self.transition.keys() ^ self.scores.keys()):
            raise ValueError(f"transition and scores differ in {odd}: give every attention in both")
        for name, scores in self.scores.items():
            matrix, heads = self.transition[name], len(scores)
            if len(matrix) != heads or any(len(row) != heads for row in matrix):
                raise ValueError(f"transition['{name}'] is not {heads} x {heads}, as its {heads} scores ask")
            if name in self.left_at and len(self.left_at[name]) != heads:
                raise ValueError(f"left_at['{name}'] is not of {heads} heads, as its {heads} scores are")
            for head, row in enumerate(matrix):
                if abs(sum(row) - 1) > _ROW_SUM_TOLERANCE:
                    raise ValueError(f"transition['{name}'][{head}] sums to {sum(row):.6g}, must be 1")
        return self


class TraceStep(_Level):
    """One Z-step of ADMM."""

    step: Count
    epoch: NonNegative
    rho: NonNegative
    primal: NonNegative
    dual: NonNegative
    flips: Count


class Admm(_Level):
    """How the ADMM stage went and ended."""

    status: str
    metric: str
    penalty: str
    trace: Many[TraceStep]
    loss_before_cut: NonNegative
    loss_after_cut: NonNegative


class Equality(_Level):
    """The check that the compacted model computes what the masked dense model computes."""

    max_relative_difference: NonNegative
    tolerance: NonNegative
    images: Positive


class Epoch(_Level):
    """One epoch of training; ``top1`` and ``loss`` are None where it was not scored."""

    epoch: Count
    train_loss: float
    top1: Percent | None
    loss: NonNegative | None
    learning_rate: NonNegative
    seconds: NonNegative


class Curves(_Level):
    """The epochs of every training stage; a stage that was not run is empty."""

    dense: Many[Epoch] = ()
    admm: Many[Epoch] = ()
    finetune: Many[Epoch] = ()
    dense_retrained: Many[Epoch] = ()


class HeadMaps(_Level):
    """Where a head of the dense model looks, a veil over each image of :class:`Samples`."""

    attention: str
    head: Count
    maps: Many[Picture]


class Samples(_Level):
    """A few held-out images, and what heads and models make of them.

    ``before`` and ``after`` are the outputs of the dense and the pruned model, where these are maps.
    """

    images: Many[Picture]
    heads: Many[HeadMaps] = ()
    before: Many[Picture] = ()
    after: Many[Picture] = ()

    @model_validator(mode="after")
    def _one_an_image(self) -> Self:
        images, before, after = len(self.images), len(self.before), len(self.after)
        if (before, after) not in ((0, 0), (images, images)):
            raise ValueError(f"before and after have {before} and {after} pictures for {images} images")
        for of in self.heads:
            if len(of.maps) != len(self.images):
                raise ValueError(
                    f"head {of.head} of '{of.attention}' has {len(of.maps)} maps for {len(self.images)} images"
                )
        return self


class Report(_Level):
    """What a run did and why: the whole of ``report.json`` but its digest.

    Raises:
        pydantic.ValidationError: A part is missing, unknown or has a wrong value; :func:`parse` puts it in words.
    """

    schema_version: Literal[4] = SCHEMA_VERSION
    gohsp: str
    created: Annotated[str, AfterValidator(_is_utc)]
    command: Many[str]
    seed: int
    machine: Machine
    versions: dict[str, str]
    method: Literal["oneshot", "finetune", "gohsp"]
    model: Model
    data: Data
    budget: Budget
    dense: Metrics
    dense_retrained: Metrics | None = None
    pruned: Metrics
    fidelity: Fidelity | None = None
    heal: Heal | None = None
    speed: Speed | None = None
    plan: Plan
    ranking: Ranking
    admm: Admm | None = None
    equality: Equality
    curves: Curves = Curves()
    samples: Samples | None = None
    timings: dict[str, NonNegative]
    config: FreeDict

    @model_validator(mode="after")
    def _one_score_a_head(self) -> Self:
        given = {name: len(scores) for name, scores in self.ranking.scores.items()}
        dense = self.plan.dense.items()
        heads = {name: of.heads for name, of in dense if isinstance(of, AttentionWidths) and not is_absent(of)}
        for name in sorted(given.keys() | heads.keys()):
            if given.get(name, 0) != heads.get(name, 0):
                raise ValueError(
                    f"ranking.scores has {given.get(name, 0)} heads of '{name}', plan.dense has {heads.get(name, 0)}"
                )
        return self

    @model_validator(mode="after")
    def _shown_heads_are_there(self) -> Self:
        for shown in self.samples.heads if self.samples else ():
            if shown.head >= len(self.ranking.scores.get(shown.attention, ())):
                raise ValueError(f"samples.heads names head {shown.head} of '{shown.attention}', which is not ranked")
        return self


def parse(content: Any) -> Report:
    """Make a report of plain JSON data.

    Args:
        content: Dicts, lists, strings, finite numbers, booleans, None.

    Raises:
        RunError: Of another schema version, or a key is missing, unknown or has a wrong value; the message
            names every such key (the first five).
    """
    if not isinstance(content, Mapping):
        raise RunError(f"a report is a JSON object, got {type(content).__name__}; see docs/report.md")
    version = content.get("schema_version")
    if version in FIRST_EDITION:
        raise RunError(
            f"the report has schema_version {version}, which gohsp 0.1 (the first edition) reads; this gohsp reads "
            f"{SCHEMA_VERSION}: use gohsp 0.1, or run again"
        )
    if version != SCHEMA_VERSION:
        raise RunError(
            f"the report has schema_version {version!r}, this gohsp reads {SCHEMA_VERSION}: use the gohsp that wrote "
            "it, or run again"
        )
    try:
        return Report.model_validate(dict(content))
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise RunError(f"the report does not follow its schema: {shown}{more}. See docs/report.md") from error


def _problem(detail: Any) -> str:
    where = ""
    for part in detail["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    if detail["type"] == "missing":
        return f"'{where}' is missing"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], str | int | float | bool | None):
        message += f" (given {detail['input']!r})"
    return f"'{where}': {message}" if where else message
