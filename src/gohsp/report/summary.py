"""The before/after table that the page shares with the terminal, and how its numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gohsp.report.schema import Fidelity, Metrics, Report

METHODS = {"oneshot": "one-shot", "finetune": "cut and fine-tuned", "gohsp": "ADMM, cut and fine-tuned"}
UNITS = {"classification": "nats", "features": "of variance"}
"""What a distance of outputs is counted in, by the objective; another objective is its own unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """One model of the before/after table; changes are against the dense model, None for itself.

    Attributes:
        model: "dense", "dense, trained longer" or "pruned".
        params: Number of parameters.
        macs: Multiply-accumulates of one image.
        top1: Top-1 accuracy in percent; None, like all other scores, where no labels were read.
        top1_error: Its standard error in percentage points, from the number of images scored.
        top5: Top-5 accuracy in percent.
        loss: Mean cross-entropy in nats.
        agreement: Share of images with the dense model's first prediction, before fine-tuning, in percent.
        agreement_error: Its standard error in percentage points.
        distance: Mean distance of the outputs from the dense model's, likewise.
        params_change: In percent.
        macs_change: In percent.
        top1_change: In percentage points.
        top5_change: In percentage points.
        loss_change: In nats.
    """

    model: str
    params: int
    macs: int
    top1: float | None
    top1_error: float | None
    top5: float | None
    loss: float | None
    agreement: float | None
    agreement_error: float | None
    distance: float | None
    params_change: float | None
    macs_change: float | None
    top1_change: float | None
    top5_change: float | None
    loss_change: float | None

    def cells(self) -> list[tuple[str, str]]:
        """A (value, change) pair of texts for each of the table's :func:`headers`; an unknown change is empty."""
        sizes = [
            (self.model, ""),
            (quantity(self.params), signed(self.params_change, 1, " %")),
            (quantity(self.macs), signed(self.macs_change, 1, " %")),
        ]
        if self.top1 is not None:
            return [
                *sizes,
                (f"{self.top1:.1f} ± {self.top1_error:.1f}", signed(self.top1_change, 1)),
                (f"{self.top5:.1f}", signed(self.top5_change, 1)),
                (f"{self.loss:.3f}", signed(self.loss_change, 3)),
            ]
        error = f" ± {self.agreement_error:.1f}" if self.agreement_error else ""
        agreement = None if self.agreement is None else f"{self.agreement:.1f}{error}"
        distance = None if self.distance is None else distance_text(self.distance)
        return [*sizes, *((text, "") for text in (agreement, distance) if text is not None)]


def headers(report: Report) -> tuple[str, ...]:
    """What stands above the columns of the before/after table: scores, or without labels fidelity, where there is any.

    Args:
        report: The report.
    """
    sizes, fidelity = ("model", "parameters", "MACs"), report.fidelity
    if report.pruned.top1 is not None:
        return (*sizes, "top-1 (%)", "top-5 (%)", "loss (nats)")
    if fidelity is None:
        return sizes
    agrees = () if fidelity.agreement is None else ("agreement (%)",)
    return (*sizes, *agrees, f"distance ({UNITS.get(fidelity.objective, fidelity.objective)})")


def summary_table(report: Report) -> list[SummaryRow]:
    """The before/after table: dense, dense trained on (where there is one) and pruned."""
    fidelity = report.fidelity
    agreement = None if fidelity is None else fidelity.agreement
    same = {"distance": 0.0, "agreement": None if agreement is None else 100.0}
    itself = None if fidelity is None else fidelity.model_copy(update=same)
    rows = [_row("dense", report.dense, None, itself)]
    if report.dense_retrained is not None:
        rows.append(_row("dense, trained longer", report.dense_retrained, report.dense, None))
    return [*rows, _row("pruned", report.pruned, report.dense, fidelity)]


def relative(value: float, reference: float) -> float:
    """The change from ``reference`` (not zero) to ``value`` in percent."""
    return 100 * (value - reference) / reference


def quantity(value: float) -> str:
    """A count with three figures and a unit prefix: 5,717,416 is "5.72 M"."""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{prefix}"
    return str(value)


def distance_text(distance: float) -> str:
    """A distance of outputs with three places, or with two figures where these would tell nothing: 0.321, 0.00012."""
    text = f"{distance:.3f}"
    return text if float(text) or not distance else f"{distance:.2g}"


def signed(value: float | None, digits: int, unit: str = "") -> str:
    """A change with its sign, a true minus; None gives no text."""
    if value is None:
        return ""
    text = f"{value:+.{digits}f}"
    if not float(text):
        text = f"±{0:.{digits}f}"
    return text.replace("-", "−") + unit


def _row(model: str, metrics: Metrics, dense: Metrics | None, fidelity: Fidelity | None) -> SummaryRow:
    def change(score: str) -> float | None:
        now, before = getattr(metrics, score), getattr(dense, score, None)
        return None if now is None or before is None else now - before

    return SummaryRow(
        model=model,
        params=metrics.params,
        macs=metrics.macs,
        top1=metrics.top1,
        top1_error=standard_error(metrics.top1, metrics.n),
        top5=metrics.top5,
        loss=metrics.loss,
        agreement=None if fidelity is None else fidelity.agreement,
        agreement_error=None if fidelity is None else standard_error(fidelity.agreement, fidelity.images),
        distance=None if fidelity is None else fidelity.distance,
        params_change=relative(metrics.params, dense.params) if dense else None,
        macs_change=relative(metrics.macs, dense.macs) if dense else None,
        top1_change=change("top1"),
        top5_change=change("top5"),
        loss_change=change("loss"),
    )


def standard_error(percent: float | None, images: int | None) -> float | None:
    """Of a share of so many images, in percentage points."""
    if percent is None or images is None:
        return None
    return math.sqrt(percent * (100 - percent) / images)
