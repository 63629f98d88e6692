"""The report as one self-contained HTML page, and the before/after table it shares with the terminal."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from gohsp.report import plots
from gohsp.structure import amount

HEADERS = ("model", "parameters", "MACs", "top-1 (%)", "top-5 (%)", "loss (nats)")
SHOWN_CLASSES = 20
"""Names of classes that the page lists; ``report.json`` has all."""
_MODELS = {"dense": "dense", "dense_retrained": "dense, trained longer", "pruned": "pruned"}


@dataclass(frozen=True, kw_only=True)
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
    params_change: float | None
    macs_change: float | None
    top1_change: float | None
    top5_change: float | None
    loss_change: float | None

    def _top1(self) -> str:
        return "–" if self.top1 is None else f"{self.top1:.1f} ± {self.top1_error:.1f}"

    def cells(self) -> list[tuple[str, str]]:
        """Return a (value, change) pair of texts for each of `HEADERS`; an unknown change is empty."""
        return [
            (self.model, ""),
            (quantity(self.params), signed(self.params_change, 1, " %")),
            (quantity(self.macs), signed(self.macs_change, 1, " %")),
            (self._top1(), signed(self.top1_change, 1)),
            (_fixed(self.top5, 1), signed(self.top5_change, 1)),
            (_fixed(self.loss, 3), signed(self.loss_change, 3)),
        ]


def summary_table(report: Mapping[str, Any]) -> list[SummaryRow]:
    """Return the before/after table: dense, dense trained on (where there is one) and pruned.

    Args:
        report: A valid report.
    """
    return [_row(key, report[key], report["dense"]) for key in _MODELS if report.get(key)]


def render_html(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML page with inline style and pictures; it loads nothing and runs nothing.

    Args:
        report: A valid report.
    """
    environment = Environment(
        loader=PackageLoader("gohsp.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "quantity": quantity,
        "signed": signed,
        "duration": duration,
        "amount": lambda cost, kind: amount(kind, cost),
        "index_ranges": index_ranges,
        "shortened": shortened,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    ranking, plan = report["ranking"], report["plan"]
    graphs = [
        _svg(
            plots.head_graph(transition, scores, kept["heads"], title=f"block {block}", key=False),
            f"graph{block}",
            f"Markov chain on the heads of block {block}",
        )
        for block, (transition, scores, kept) in enumerate(
            zip(ranking["transition"], ranking["scores"], plan["kept"], strict=True)
        )
    ]
    return environment.get_template("template.html.j2").render(
        report=report,
        rows=summary_table(report),
        headers=HEADERS,
        created=datetime.fromisoformat(report["created"]).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(report["command"]),
        warnings=_warnings(report),
        heads={key: sum(block["heads"] for block in plan[key]) for key in ("dense", "pruned")},
        budget_margin=-relative(report["budget"]["achieved"], report["budget"]["limit"]),
        few_edges=max(map(len, ranking["scores"])) > plots.FEW_HEADS,
        widths=_svg(plots.kept_widths(report), "widths", "Kept widths by block and kind"),
        importance=_svg(plots.head_importance(report), "importance", "Importance of every head"),
        graphs=graphs,
        training=(
            _svg(plots.training(report), "training", "The course of training over the epochs")
            if plots.has_training(report)
            else None
        ),
    )


def relative(value: float, reference: float) -> float:
    """Return the change from ``reference`` (not zero) to ``value`` in percent."""
    return 100 * (value - reference) / reference


def quantity(value: float) -> str:
    """Return a count with three figures and a unit prefix: 5,717,416 is "5.72 M"."""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{prefix}"
    return str(value)


def signed(value: float | None, digits: int, unit: str = "") -> str:
    """Return a change with its sign, a true minus; None gives no text."""
    if value is None:
        return ""
    text = f"{value:+.{digits}f}"
    if not float(text):
        text = f"±{0:.{digits}f}"
    return text.replace("-", "−") + unit


def duration(seconds: float) -> str:
    """Return seconds as people read them: "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def index_ranges(indices: list[int]) -> str:
    """Return increasing indices with runs joined: [0, 1, 2, 5] is "0–2, 5"; none is "none"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def shortened(names: list[str]) -> str:
    """Return names with commas between them, the first 20 of many: "ant, bee and 998 more"."""
    rest = len(names) - SHOWN_CLASSES
    return ", ".join(names[:SHOWN_CLASSES]) + (f" and {rest:,} more" if rest > 0 else "")


def _row(key: str, metrics: Mapping[str, Any], dense: Mapping[str, Any]) -> SummaryRow:
    is_dense, scored = key == "dense", metrics.get("top1") is not None

    def change(score: str) -> float | None:
        return metrics[score] - dense[score] if scored and not is_dense else None

    share = metrics["top1"] / 100 if scored else 0.0
    return SummaryRow(
        model=_MODELS[key],
        params=metrics["params"],
        macs=metrics["macs"],
        top1=metrics.get("top1"),
        top1_error=100 * math.sqrt(share * (1 - share) / metrics["n"]) if scored else None,
        top5=metrics.get("top5"),
        loss=metrics.get("loss"),
        params_change=None if is_dense else relative(metrics["params"], dense["params"]),
        macs_change=None if is_dense else relative(metrics["macs"], dense["macs"]),
        top1_change=change("top1"),
        top5_change=change("top5"),
        loss_change=change("loss"),
    )


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before believing the table."""
    budget, equality, admm = report["budget"], report["equality"], report.get("admm")
    warnings = []
    if budget["achieved"] > budget["limit"]:
        taken, allowed = (amount(budget["kind"], budget[key]) for key in ("achieved", "limit"))
        warnings.append(f"The budget is not met: {taken}, {allowed} allowed.")
    if equality["max_relative_difference"] > equality["tolerance"]:
        warnings.append("The compacted model does not compute what the masked dense model computes.")
    if admm and admm["status"] != "converged":
        warnings.append(f"ADMM did not converge; it ended with status “{admm['status']}”.")
    if unreadable := report["data"].get("unreadable_images"):
        warnings.append(f"{unreadable:,} images could not be read and were left out.")
    return warnings + [f"Ranking: {note}" for note in report["ranking"]["notes"]]


def _svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as inline SVG that scales with its box; ``name`` keeps its ids apart on the page."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prologue and no external DTD inside HTML
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
