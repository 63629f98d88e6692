"""The report, and the comparison of several, each as one self-contained HTML page."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from gohsp.report import comparison, plots
from gohsp.report.blocks import blocks_of
from gohsp.report.comparison import Origin
from gohsp.report.schema import Report
from gohsp.report.summary import METHODS, distance_text, headers, quantity, relative, signed, summary_table
from gohsp.structure import AttentionWidths, Widths, amount, is_absent

SHOWN_CLASSES = 20
"""Names of classes that the page lists; ``report.json`` has all."""

THEME = {
    plots.INK: "ink",
    plots.EDGE: "edge",
    plots.MUTED: "muted",
    plots.LINE: "axis",
    plots.PALE: "pale",
    plots.PAPER: "card",
    plots.KEPT: "kept",
    plots.REMOVED: "gone",
    plots.SOFT: "violet",
}
"""The page's variable for each colour that follows it, light or dark."""


def render_html(report: Report) -> str:
    """Return the report as one HTML page with inline style and pictures; it loads nothing and runs nothing."""
    plan, ranked, trained = report.plan, bool(report.ranking.scores), plots.has_training(report)
    return _page(
        "report.html.j2",
        report=report,
        rows=summary_table(report),
        headers=headers(report),
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
        looks=_looks(report),
        widths=_picture(plots.kept_widths(report), "widths", "Kept widths by block and kind"),
        importance=_picture(plots.head_importance(report), "importance", "Importance of every head")
        if ranked
        else None,
        graphs=_graphs(report),
        training=_picture(plots.training(report), "training", "The course of training over the epochs")
        if trained
        else None,
    )


def render_comparison(reports: Mapping[str, Report]) -> str:
    """Return several reports, by the runs' names, as one HTML page of the same kind."""
    measures, marks = comparison.measures_of(reports), comparison.marks_of(reports)
    origins = comparison.origins_of(reports)
    warnings = [f"{name}: {warning}" for name, report in reports.items() for warning in _warnings(report)]
    return _page(
        "comparison.html.j2",
        reports=reports,
        marks=marks,
        origins=origins,
        measures=measures,
        headers=comparison.headers_of(measures),
        rows=list(comparison.rows_of(reports, measures)),
        warnings=comparison.cautions(reports) + warnings,
        tradeoffs=_tradeoffs(reports, origins),
        plans=[_plans(origin, index, marks) for index, origin in enumerate(origins)],
        kinds=plots.KINDS,
        blocks_of=blocks_of,
    )


def _page(template: str, **content: Any) -> str:
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
        "distance": distance_text,
        "duration": duration,
        "amount": lambda cost, kind: amount(kind, cost),
        "index_ranges": index_ranges,
        "shortened": shortened,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    return environment.get_template(template).render(**content)


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
        graphs.append(_picture(figure, f"graph{index}", f"Markov chain on the heads of block {label}"))
    return graphs


def _looks(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The heads whose attention is shown, by the labels of their blocks."""
    labels = dict(zip(report.ranking.scores, plots.attention_labels(report), strict=True))
    looks: dict[str, list[dict[str, Any]]] = {}
    for shown in report.samples.heads if report.samples else ():
        kept = shown.head in report.plan.kept_heads(shown.attention)
        score = report.ranking.scores[shown.attention][shown.head]
        told = {"head": shown.head, "kept": kept, "score": score, "maps": shown.maps}
        looks.setdefault(labels[shown.attention], []).append(told)
    return looks


def _tradeoffs(reports: Mapping[str, Report], origins: Sequence[Origin]) -> list[tuple[str, str]]:
    """Titles and pictures of quality against cost."""
    found = []
    for measure in filter(lambda measure: measure.drawn, comparison.measures_of(reports)):
        for cost in comparison.costs_of(reports):
            points = comparison.points_of(reports, cost, measure)
            if not any(point.mark for point in points):
                continue
            figure = plots.tradeoff(points, [origin.name for origin in origins], cost.name, measure.name)
            title = f"{measure.name} against {cost.name}"
            title = title[0].upper() + title[1:]
            found.append((title, _picture(figure, f"tradeoff{len(found)}", title, focusable=True)))
    return found


def _plans(origin: Origin, index: int, marks: Mapping[str, str]) -> list[tuple[str, str]]:
    """Titles and pictures of what the runs keep, a picture a kind of width."""
    plans = {marks[name]: report.plan for name, report in origin.runs.items()}
    return [
        (f"Kept {name}", _picture(figure, f"plan{index}{kind}", f"Kept {name} by block and run"))
        for kind, name in plots.KINDS.items()
        if (figure := plots.widths_beside(plans, kind)) is not None
    ]


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


def _picture(figure: Figure, name: str, label: str, *, focusable: bool = False) -> str:
    """Return a figure as inline SVG that scales with its box, under places that tell their values when pointed at.

    Args:
        figure: The figure.
        name: Keeps its ids apart on the page.
        label: What it is, for those who do not see it.
        focusable: Whether the places are reached by keyboard, too, and read aloud; else a table has their values.
    """
    svg = _svg(figure, name, label)
    spots = []
    for text, (left, top, width, height) in plots.tips(figure):
        side = "l" if left + width / 2 < 30 else "r" if left + width / 2 > 70 else "m"
        box = f"left:{left:.2f}%;top:{top:.2f}%;width:{width:.2f}%;height:{height:.2f}%"
        reached = f' tabindex="0" role="img" aria-label="{escape(text)}"' if focusable else ""
        spots.append(f'<i class="{side}"{reached} style="{box}"><b>{escape(text)}</b></i>')
    hidden = "" if focusable else ' aria-hidden="true"'
    return f'<div class="plot">{svg}<div{hidden}>{"".join(spots)}</div></div>'


def _svg(figure: Figure, name: str, label: str) -> str:
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=no_metadata, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prologue and no external DTD inside HTML
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--{THEME[found[0]]})" if found[0] in THEME else found[0], svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)
