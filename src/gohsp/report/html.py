"""The report as one self-contained HTML page."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from html import escape

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from gohsp.report import plots
from gohsp.report.blocks import blocks_of
from gohsp.report.schema import Report
from gohsp.report.summary import HEADERS, quantity, relative, signed, summary_table
from gohsp.structure import AttentionWidths, Widths, amount, is_absent

SHOWN_CLASSES = 20
"""Names of classes that the page lists; ``report.json`` has all."""
METHODS = {"oneshot": "one-shot", "finetune": "cut and fine-tuned", "gohsp": "ADMM, cut and fine-tuned"}


def render_html(report: Report) -> str:
    """Return the report as one HTML page with inline style and pictures; it loads nothing and runs nothing."""
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
    plan, ranked, trained = report.plan, bool(report.ranking.scores), plots.has_training(report)
    return environment.get_template("template.html.j2").render(
        report=report,
        rows=summary_table(report),
        headers=HEADERS,
        created=datetime.fromisoformat(report.created).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(report.command),
        method=METHODS[report.method],
        unit=distance_unit(report.fidelity.objective) if report.fidelity else "",
        warnings=_warnings(report),
        blocks=blocks_of(plan),
        removed=[name for name, of in plan.pruned.items() if is_absent(of) and not is_absent(plan.dense[name])],
        heads={"dense": _heads(plan.dense), "pruned": _heads(plan.pruned)},
        budget_margin=-relative(report.budget.achieved, report.budget.limit),
        few_edges=max(map(len, report.ranking.scores.values()), default=0) > plots.FEW_HEADS,
        widths=_svg(plots.kept_widths(report), "widths", "Kept widths by block and kind"),
        importance=_svg(plots.head_importance(report), "importance", "Importance of every head") if ranked else None,
        graphs=_graphs(report),
        training=_svg(plots.training(report), "training", "The course of training over the epochs")
        if trained
        else None,
    )


def distance_unit(objective: str) -> str:
    """What a distance of outputs is counted in, which the objective says."""
    units = {"classification": "nats", "features": "of the outputs' variance"}
    return units.get(objective, f"by the objective “{objective}”")


def duration(seconds: float) -> str:
    """Seconds as people read them: "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def index_ranges(indices: Sequence[int]) -> str:
    """Increasing indices with runs joined: [0, 1, 2, 5] is "0–2, 5"; none is "none"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def shortened(names: Sequence[str]) -> str:
    """Names with commas between them, the first 20 of many: "ant, bee and 998 more"."""
    rest = len(names) - SHOWN_CLASSES
    return ", ".join(names[:SHOWN_CLASSES]) + (f" and {rest:,} more" if rest > 0 else "")


def _heads(widths: Widths) -> int:
    return sum(of.heads for of in widths.values() if isinstance(of, AttentionWidths))


def _graphs(report: Report) -> list[str]:
    """The chain of every ranked attention, as pictures."""
    ranking, graphs = report.ranking, []
    for index, (name, label) in enumerate(zip(ranking.scores, plots.attention_labels(report), strict=True)):
        kept, title = report.plan.kept_heads(name), f"block {plots.elided(label)}"
        chain, left_at = (ranking.transition[name], ranking.scores[name]), ranking.last_steps(name)
        figure = plots.head_graph(*chain, kept, title=title, key=False, left_at=left_at)
        graphs.append(_svg(figure, f"graph{index}", f"Markov chain on the heads of block {label}"))
    return graphs


def _warnings(report: Report) -> list[str]:
    """What a reader must know before believing the table."""
    budget, equality, admm = report.budget, report.equality, report.admm
    warnings = []
    if budget.achieved > budget.limit:
        taken, allowed = (amount(budget.kind, cost) for cost in (budget.achieved, budget.limit))
        warnings.append(f"The budget is not met: {taken}, {allowed} allowed.")
    if equality.max_relative_difference > equality.tolerance:
        warnings.append("The compacted model does not compute what the masked dense model computes.")
    if admm and admm.status != "converged":
        warnings.append(f"ADMM did not converge; it ended with status “{admm.status}”.")
    if report.data.unreadable_images:
        warnings.append(f"{report.data.unreadable_images:,} images could not be read and were left out.")
    return warnings + [f"Ranking: {note}" for note in report.ranking.notes]


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
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)
