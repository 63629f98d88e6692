"""The schema of ``report.json``, version 3: what a run writes, and what is accepted when read back.

The same schema in prose, key by key with units, is ``docs/report.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from gohsp.errors import RunError, nearest

SCHEMA_VERSION = 3
"""What is written; every key that version 2 added is optional, and version 3 added the digest of the file alone."""

READABLE_VERSIONS = (1, 2, 3)

# A chain's rows are written in float64 after a float64 normalisation; float32 input costs 1e-6.
_ROW_SUM_TOLERANCE = 1e-4
_SHOWN_PROBLEMS = 5


def _is_utc(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError(f"'{text}' is not in UTC: end it with 'Z' or '+00:00'")
    return text


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
Indices = list[Count]
FreeDict = dict[str, JsonValue]


class _Level(BaseModel):
    """One level of the report: exact types, finite numbers, no key that is not declared."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)

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
    """The dense model, as its library builds it."""

    library: str
    architecture: str
    arguments: FreeDict


class Data(_Level):
    """The images that calibrated, trained and scored the models; the one-shot route only calibrates."""

    source: str
    train_split: str
    image_size: Positive
    classes: Positive
    class_names: list[str] | None = None
    calibration_images: Positive | None = None
    validation_split: str | None = None
    train_images: Count | None = None
    validation_images: Count | None = None
    unreadable_images: Count = 0

    @model_validator(mode="after")
    def _one_name_a_class(self) -> Data:
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.classes} classes")
        return self


class Budget(_Level):
    """The bound that was asked for, and what the pruned model takes; of a latency budget, milliseconds a batch."""

    kind: Literal["params", "macs", "latency"]
    requested: str
    limit: Positive | AboveZero
    achieved: Positive | AboveZero

    @model_validator(mode="after")
    def _counts_are_whole(self) -> Budget:
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
    def _all_or_none(self) -> Metrics:
        scores = (self.top1, self.top5, self.loss, self.n)
        if None in scores and any(score is not None for score in scores):
            raise ValueError("give all of top1, top5, loss and n, or none of them")
        return self


class Fidelity(_Level):
    """The cut model against the dense one, before any fine-tuning, on images that nothing was measured on.

    ``kl`` is the mean divergence of its predictions in nats, ``predicted_kl`` what the damage curves foresaw (None
    without them), ``agreement`` the share of images with the same first prediction.
    """

    images: Positive
    kl: NonNegative
    predicted_kl: NonNegative | None
    agreement: Percent


class PolishStep(_Level):
    """The polish after one more window: relative error on calibration images, divergence on held-out ones."""

    blocks: Count
    error: NonNegative | None
    kl: NonNegative


class Polish(_Level):
    """Tuning of blocks after a one-shot cut; ``kept`` is how many windows stayed, first to last."""

    kept: Count
    curve: list[PolishStep]

    @model_validator(mode="after")
    def _kept_is_there(self) -> Polish:
        if self.kept not in [step.blocks for step in self.curve]:
            raise ValueError(f"kept names {self.kept} blocks, which curve does not hold")
        return self


class Widths(_Level):
    """The widths of one block; ``qk`` and ``vo`` are those of each head."""

    heads: Count
    qk: Count
    vo: Count
    ffn: Count


class Kept(_Level):
    """The dense indices that one block keeps; ``qk`` and ``vo`` have a list for each kept head."""

    heads: Indices
    qk: list[Indices]
    vo: list[Indices]
    ffn: Indices


class Plan(_Level):
    """Dense and pruned widths and the kept indices, block by block.

    ``allocation_stages`` is how often damage curves were measured on the way; None where widths came otherwise.
    """

    dense: Annotated[list[Widths], Field(min_length=1)]
    pruned: list[Widths]
    kept: list[Kept]
    allocation_stages: Positive | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Plan:
        blocks = len(self.dense)
        if not len(self.pruned) == len(self.kept) == blocks:
            raise ValueError(
                f"dense has {blocks} blocks, pruned {len(self.pruned)} and kept {len(self.kept)}: "
                "give every block in each"
            )
        for block, (dense, pruned, kept) in enumerate(zip(self.dense, self.pruned, self.kept, strict=True)):
            _check_indices(f"kept[{block}].heads", kept.heads, pruned.heads, dense.heads)
            _check_indices(f"kept[{block}].ffn", kept.ffn, pruned.ffn, dense.ffn)
            for kind, per_head in (("qk", kept.qk), ("vo", kept.vo)):
                if len(per_head) != pruned.heads:
                    raise ValueError(f"kept[{block}].{kind} has {len(per_head)} lists for {pruned.heads} kept heads")
                for position, indices in enumerate(per_head):
                    name = f"kept[{block}].{kind}[{position}]"
                    _check_indices(name, indices, getattr(pruned, kind), getattr(dense, kind))
        return self


class Ranking(_Level):
    """The heads' scores, and the Markov chain they come from, block by block."""

    method: str
    edge: str
    scope: Literal["layer", "global"]
    damping: Annotated[float, Field(ge=0, le=1)]
    teleport: str
    scores: list[list[NonNegative]]
    transition: list[list[list[NonNegative]]]
    iterations: Count
    residual: NonNegative
    images: Count
    notes: list[str]

    @model_validator(mode="after")
    def _is_chain(self) -> Ranking:
        if len(self.transition) != len(self.scores):
            raise ValueError(f"transition has {len(self.transition)} blocks, scores {len(self.scores)}")
        for block, (scores, matrix) in enumerate(zip(self.scores, self.transition, strict=True)):
            heads = len(scores)
            if len(matrix) != heads or any(len(row) != heads for row in matrix):
                raise ValueError(f"transition[{block}] is not {heads} x {heads}, as its {heads} scores ask")
            for head, row in enumerate(matrix):
                total = sum(row)
                # With scope "global" some writers leave out the moves to other blocks, others scale what is left.
                short = self.scope == "layer" and total < 1 - _ROW_SUM_TOLERANCE
                if short or total > 1 + _ROW_SUM_TOLERANCE:
                    allowed = "1" if self.scope == "layer" else "at most 1"
                    raise ValueError(f"transition[{block}][{head}] sums to {total:.6g}, must be {allowed}")
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
    trace: list[TraceStep]
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
    """The epochs of every training stage; a stage that was not run is empty or absent."""

    dense: list[Epoch] = []
    admm: list[Epoch] = []
    finetune: list[Epoch] = []
    dense_retrained: list[Epoch] = []


class Report(_Level):
    """The whole of ``report.json``."""

    schema_version: Literal[1, 2, 3]
    gohsp: str
    created: Annotated[str, AfterValidator(_is_utc)]
    command: list[str]
    seed: int
    machine: Machine
    versions: dict[str, str]
    model: Model
    data: Data
    budget: Budget
    dense: Metrics
    dense_retrained: Metrics | None = None
    pruned: Metrics
    fidelity: Fidelity | None = None
    polish: Polish | None = None
    speed: Speed | None = None
    plan: Plan
    ranking: Ranking
    admm: Admm | None = None
    equality: Equality
    curves: Curves
    timings: dict[str, NonNegative]
    recipe: FreeDict

    @model_validator(mode="after")
    def _one_score_a_head(self) -> Report:
        given = [len(scores) for scores in self.ranking.scores]
        heads = [block.heads for block in self.plan.dense]
        if given != heads:
            raise ValueError(f"ranking.scores has {given} heads by block, plan.dense has {heads}")
        return self


def validate(report: Mapping[str, Any]) -> None:
    """Check a report against the schema.

    Args:
        report: Plain JSON data: dicts, lists, strings, finite numbers, booleans, None.

    Raises:
        RunError: Of another schema version, or a key is missing, unknown or has a wrong value; the message
            names every such key (the first five).
    """
    if not isinstance(report, Mapping):
        raise RunError(f"a report is a JSON object, got {type(report).__name__}; see docs/report.md")
    version = report.get("schema_version")
    if version not in READABLE_VERSIONS:
        raise RunError(
            f"the report has schema_version {version!r}, this gohsp knows {READABLE_VERSIONS}: "
            "use the gohsp that wrote it, or run again"
        )
    try:
        Report.model_validate(dict(report))
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise RunError(f"the report does not follow its schema: {shown}{more}. See docs/report.md") from error


def _check_indices(name: str, indices: list[int], kept: int, dense: int) -> None:
    if len(indices) != kept:
        raise ValueError(f"{name} has {len(indices)} indices, the pruned width is {kept}")
    if any(a >= b for a, b in pairwise(indices)):
        raise ValueError(f"{name} must be strictly increasing")
    if indices and indices[-1] >= dense:
        raise ValueError(f"{name} names index {indices[-1]}, the dense width is {dense}")


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
