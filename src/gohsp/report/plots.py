"""The report's pictures, as matplotlib figures that need no display and keep no global state.

All are drawn narrow (4.8 inches or less) with 8 to 9 point text, so that the same vector picture can be
read across a phone and fills half a desktop page.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gohsp.errors import RunError
from gohsp.report.blocks import Block, block_name, blocks_of, short_labels
from gohsp.report.comparison import Point
from gohsp.report.schema import Epoch, Plan, Report, TraceStep
from gohsp.structure import Widths

INK, EDGE, MUTED, LINE, PALE, PAPER = "#1f2937", "#475569", "#6b7280", "#9ca3af", "#e5e7eb", "#ffffff"
KEPT, REMOVED, SOFT = "#2563eb", "#c2410c", "#7c3aed"
"""Colours that follow the page's, light or dark."""

ON_PALE, ON_DEEP, ON_ANY = "#1f2936", "#fffffe", "#c2410d"
"""Inks on the colours of a heat map, which are the same on any page."""

STAGES = {  # colour, line style and name of each training curve; the style tells them apart without colour
    "dense": (MUTED, "-", "dense"),
    "admm": (SOFT, "-", "ADMM"),
    "finetune": (KEPT, "-", "pruned, fine-tuned"),
    "dense_retrained": (REMOVED, "--", "dense, trained longer"),
}
KINDS = {"heads": "heads", "qk": "q/k width", "vo": "v/o width", "units": "FFN units"}

_ORIGINS = (KEPT, SOFT, REMOVED, EDGE)
"""Colours of dense models and of what was cut from them."""

# Up to this many heads, scores are written out and every edge is drawn.
FEW_HEADS = 8
STRONGEST_EDGES = 3
_WIDTH = 4.8
_REACH = 0.09
"""Inches around a point at which it is pointed at."""

_LONGEST_LABEL = 14
_SMALL, _TEXT = 8, 9
_HEAT: LinearSegmentedColormap = LinearSegmentedColormap.from_list(
    "heat", ["#eff6ff", "#bfdbfe", "#60a5fa", "#2564eb", "#172554"]
)


def _tip(axes: Axes, text: str, x: float, y: float, width: float = 0, height: float = 0) -> None:
    """Say what a page shows where a reader points at a part of a picture: a box in data units, or a point.

    It is an artist that is never drawn, with the text as its id.
    """
    axes.add_artist(Rectangle((x, y), width, height, visible=False, gid=text))


def tips(figure: Figure) -> list[tuple[str, tuple[float, float, float, float]]]:
    """What to tell of the parts of a figure that was drawn.

    Returns:
        Texts, each with its box: left, top, width and height in percent of the figure.
    """
    whole, told = figure.bbox, []
    for artist in figure.findobj(lambda artist: artist.get_gid() is not None):
        box = artist.get_window_extent()
        box = box.padded(0 if box.width else figure.dpi * _REACH)
        left, top = box.x0 / whole.width, 1 - box.y1 / whole.height
        told.append((artist.get_gid() or "", (left, top, box.width / whole.width, box.height / whole.height)))
    return [(text, tuple(100 * share for share in box)) for text, box in told]  # type: ignore[misc]


def head_importance(report: Report) -> Figure:
    """Draw the ranking as a heat map: one row an attention, one column a head, removed heads crossed out.

    Args:
        report: The report.

    Returns:
        A figure; scores are written into the cells where no attention has more than eight heads.

    Raises:
        RunError: The ranking holds no heads.
    """
    if not report.ranking.scores:
        raise RunError("the report holds no heads to draw: its ranking.scores are empty")
    scores = list(report.ranking.scores.values())
    kept = [report.plan.kept_heads(name) for name in report.ranking.scores]
    rows, heads = len(scores), max(map(len, scores))
    grid = np.full((rows, heads), np.nan)
    for index, row in enumerate(scores):
        grid[index, : len(row)] = row
    scale = Normalize(float(np.nanmin(grid)), float(np.nanmax(grid)))

    figure, axes = _heat_map(grid, scale, "importance score (no unit)")
    removed = [(r, h) for r, row in enumerate(scores) for h in range(len(row)) if h not in kept[r]]
    few, labels = heads <= FEW_HEADS, attention_labels(report)
    for index, (name, row) in enumerate(report.ranking.scores.items()):
        for head, score in enumerate(row):
            _tip(axes, f"block {labels[index]}, {_head_told(report, name, head)}", head, index, 1, 1)
            if few:
                _cell(axes, index, head, f"{score:.3f}", scale(score))
    cross = _cross(axes, [(row, head + (0.16 if few else 0.5)) for row, head in removed], "removed head")
    axes.set_xticks(np.arange(heads) + 0.5, [str(head) for head in range(heads)])
    _block_axis(axes, np.arange(rows) + 0.5, labels)
    axes.set_xlabel("head", size=_TEXT)
    if removed:
        _legend(axes, cross)
    return figure


def _heat_map(grid: np.ndarray, scale: Normalize, name: str) -> tuple[Figure, Axes]:
    """Cells ``[rows, columns]``, of which NaN are left out, beside a bar that says what their colours mean."""
    rows = len(grid)
    figure = Figure(figsize=(_WIDTH, max(2.4, 1.2 + 0.27 * rows)), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=_HEAT, norm=scale, edgecolors=PAPER, linewidth=1.5)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05, aspect=max(20, 2 * rows))
    bar.set_label(name, size=_TEXT, color=INK)
    bar.ax.tick_params(labelsize=_SMALL, colors=INK, length=2)
    for solids in bar.ax.collections:
        solids.set(rasterized=False, edgecolor="face")  # else the one bitmap in a vector picture
    bar.outline.set_visible(False)  # pyrefly: ignore
    _tidy(axes)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


def _cell(axes: Axes, row: int, column: int, text: str, shade: float) -> None:
    """Write into a cell of a heat map, whose colour is as far along the scale as ``shade``."""
    ink = ON_DEEP if shade > 0.62 else ON_PALE
    axes.text(column + 0.5, row + 0.5, text, color=ink, size=_SMALL, ha="center", va="center")


def _cross(axes: Axes, places: Sequence[tuple[int, float]], name: str) -> list[Line2D]:
    """Mark what was removed, in rows of a heat map."""
    return axes.plot(
        [across for _, across in places],
        [row + 0.5 for row, _ in places],
        "X",
        markersize=7,
        color=ON_ANY,
        markeredgecolor=ON_DEEP,
        label=name,
    )


def _head_told(report: Report, attention: str, head: int) -> str:
    """A head's score and fate."""
    steps, kept = report.ranking.last_steps(attention), head in report.plan.kept_heads(attention)
    last = f", last ranked in step {steps[head]}" if steps else ""
    score = report.ranking.scores[attention][head]
    return f"head {head}: score {score:.4f}, {'kept' if kept else 'removed'}{last}"


def head_graph(
    transition: Sequence[Sequence[float]] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    kept: Collection[int] | None = None,
    title: str = "",
    key: bool = True,
    left_at: Sequence[int] = (),
) -> Figure:
    """Draw the Markov chain on the heads of one attention, heads on a circle.

    A node's area is its score and an edge's width and opacity its transition probability, each relative to
    the picture's largest. With more than eight heads only the three likeliest moves from each head are
    drawn. Moves from a head to itself are not drawn.

    Args:
        transition: [H, H], ``transition[i][j]`` the probability of moving from head i to head j.
        scores: [H], the stationary distribution.
        kept: Indices of the heads that stay, drawn filled, the others hollow and crossed; None for all.
        title: Text above the picture, shown as it is.
        key: Write below the picture what its sizes mean.
        left_at: [H], the last step that each head was ranked in, written beside it; empty for a ranking made once.

    Returns:
        A figure.

    Raises:
        ValueError: ``transition`` is not square of the length of ``scores``.
    """
    matrix, score = np.array(transition, dtype=float), np.array(scores, dtype=float)
    count = len(score)
    if matrix.shape != (count, count):
        raise ValueError(f"transition has shape {matrix.shape}, {count} scores ask for {(count, count)}")
    np.fill_diagonal(matrix, 0)
    few = count <= FEW_HEADS
    stays = [kept is None or head in kept for head in range(count)]

    angle = np.pi / 2 - 2 * np.pi * np.arange(count) / count
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    ring = 46.0 if few else 64.0
    place = ring * direction
    largest = min(16.0, 0.8 * ring * np.sin(np.pi / max(count, 2)))  # neighbours must not touch

    # Data units are points, so that nodes, gaps and labels can be laid out without touching.
    label = (28.0 if few else 14.0) + (12.0 if left_at else 0.0)
    low, high = place[:, 1].min() - largest - label, place[:, 1].max() + largest + label
    width, above, below = 200.0, 20.0, 42.0 if key else 2.0
    total = above + high - low + below
    figure = Figure(figsize=(width / 72, total / 72))
    axes = figure.add_axes((0, below / total, 1, (high - low) / total))
    axes.set(xlim=(-width / 2, width / 2), ylim=(low, high))
    axes.set_axis_off()
    figure.text(0.5, 1 - 5 / total, title, size=10, weight="bold", color=INK, ha="center", va="top", parse_math=False)

    tiny = np.finfo(float).tiny
    radius = largest * np.sqrt(score / max(score.max(), tiny))
    _draw_moves(axes, matrix / max(matrix.max(), tiny), place, radius, few)
    for head in range(count):
        _node(axes, place[head], radius[head], stays[head])
        reach = max(radius[head], 4.0)
        told = f"head {head}, {score[head]:.4f}{_moves_told(matrix[head])}"
        _tip(axes, told, place[head][0] - reach, place[head][1] - reach, 2 * reach, 2 * reach)
        lines = [f"head {head}", f"{score[head]:.3f}"] if few else [str(head)]
        lines += [f"step {left_at[head]}"] if left_at and few else [f"({left_at[head]})"] if left_at else []
        size, ink = 9 if few else 6 if left_at else 10, INK if stays[head] else REMOVED
        _draw_label(axes, place[head], direction[head], radius[head], "\n".join(lines), size=size, color=ink)
    if key:
        edges = "edge: transition probability" + ("" if few else f" ({STRONGEST_EDGES} likeliest a head)")
        lines = ["node area: stationary probability", edges]
        if left_at:
            lines.append(("step" if few else "in brackets") + ": the last in which a head was ranked")
        if kept is not None:
            lines.append("filled: kept; hollow and crossed: removed")
        figure.text(0.5, 5 / total, "\n".join(lines), size=7, color=MUTED, ha="center", va="bottom")
    return figure


def _moves_told(chances: np.ndarray) -> str:
    """The likeliest moves from a head to others."""
    likeliest = [head for head in np.argsort(chances)[::-1][:STRONGEST_EDGES] if chances[head] > 0]
    return "; moves on to " * bool(likeliest) + ", ".join(f"{head} ({chances[head]:.2f})" for head in likeliest)


def _draw_moves(axes: Axes, strength: np.ndarray, place: np.ndarray, radius: np.ndarray, few: bool) -> None:
    """Arrows between nodes, all of a few and the likeliest of many."""
    for start in range(len(strength)):
        likeliest = np.argsort(strength[start])[::-1][: None if few else STRONGEST_EDGES]
        for end in likeliest[strength[start, likeliest] > 0]:
            share = strength[start, end]
            arrow = FancyArrowPatch(
                tuple(place[start]),
                tuple(place[end]),
                connectionstyle="arc3,rad=0.16",
                arrowstyle="-|>,head_length=0.5,head_width=0.22",
                mutation_scale=9 if few else 6,
                shrinkA=radius[start] + 1,
                shrinkB=radius[end] + 1,
                linewidth=(2.4 if few else 1.4) * share,
                alpha=0.1 + 0.6 * share,
                color=EDGE,
            )
            axes.add_patch(arrow)


def _draw_label(axes: Axes, place: np.ndarray, direction: np.ndarray, radius: float, text: str, **how: Any) -> None:
    """What stands beside a node, on the side away from the middle."""
    across, up = direction.round(6)
    x, y = place + direction * (radius + 4)
    axes.text(
        x,
        y,
        text,
        linespacing=1.05,
        ha="left" if across > 0.3 else "right" if across < -0.3 else "center",
        va="bottom" if up > 0.75 else "top" if up < -0.75 else "center",
        **how,
    )


def attention_labels(report: Report) -> list[str]:
    """The blocks of the ranked attentions, by their short labels."""
    labels = short_labels(map(block_name, report.plan.dense))
    return [labels[block_name(name)] for name in report.ranking.scores]


def kept_widths(report: Report) -> Figure:
    """Draw what each block keeps: one row a block, one panel a kind, bars as shares of the dense width.

    A sub-layer that was removed has a cross in place of its bar; one that the dense model lacks has no bar at all.

    Args:
        report: The report.

    Returns:
        A figure; the number beside each bar is the kept width in units of its kind.
    """
    blocks = blocks_of(report.plan)
    dense, pruned = (
        {kind: _column(w, blocks, kind) for kind in KINDS} for w in (report.plan.dense, report.plan.pruned)
    )
    kinds = [kind for kind in KINDS if any(dense[kind])]
    figure = Figure(figsize=(_WIDTH, max(2.4, 1.2 + 0.27 * len(blocks))), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    labels = [block.label for block in blocks]
    crosses = [
        _draw_widths(axes, labels, dense[kind], pruned[kind], KINDS[kind])
        for axes, kind in zip(panels, kinds, strict=True)
    ]
    _block_axis(panels[0], np.arange(len(blocks)), labels)
    figure.supxlabel("kept share of the dense width (%)", size=_TEXT, color=INK)
    if drawn := [cross for cross in crosses if len(cross.get_xdata())]:  # type: ignore[arg-type]
        figure.legend(handles=drawn[:1], loc="outside upper left", frameon=False, fontsize=_SMALL)
    return figure


def _column(widths: Widths, blocks: Sequence[Block], kind: str) -> list[int]:
    """The widths of a kind by block; 0 where a block has no such sub-layer."""
    names = [block.ffn if kind == "units" else block.attention for block in blocks]
    return [getattr(widths[name], kind) if name else 0 for name in names]


def _draw_widths(axes: Axes, labels: Sequence[str], dense: Sequence[int], pruned: Sequence[int], name: str) -> Line2D:
    """Draw one panel of :func:`kept_widths`; returns the crosses of removed sub-layers."""
    rows = [row for row, before in enumerate(dense) if before]
    axes.barh(rows, np.ones(len(rows)), color=PALE, height=0.72)
    axes.barh(rows, [pruned[row] / dense[row] for row in rows], color=KEPT, height=0.72)
    removed = [row for row in rows if not pruned[row]]
    (cross,) = axes.plot(
        [0.5] * len(removed),
        removed,
        "X",
        markersize=6,
        color=REMOVED,
        markeredgecolor=PAPER,
        label="removed sub-layer",
    )
    for row in rows:
        _tip(axes, f"block {labels[row]}, {name}: {_share_told(pruned[row], dense[row])}", 0, row - 0.36, 1, 0.72)
        axes.text(1.06, row, str(pruned[row]), size=_SMALL, color=INK if pruned[row] else REMOVED, va="center")
    least, most = min(dense[row] for row in rows), max(dense)
    axes.set_title(f"{name}\nof {least if least == most else f'{least}–{most}'}", size=_TEXT, color=INK)
    axes.set_xlim(0, 1.5)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    _tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 1)
    axes.tick_params(axis="y", length=0)
    return cross


def widths_beside(plans: Mapping[str, Plan], kind: str) -> Figure | None:
    """Draw what several plans for one dense model keep of one kind: one row a block, one column a plan.

    Args:
        plans: The plans, by what the columns are called; their dense widths are the same.
        kind: ``heads``, ``qk``, ``vo`` or ``units``.

    Returns:
        A figure, its cells coloured by the kept share; None where the dense model has nothing of that kind.
    """
    first = next(iter(plans.values()))
    blocks = blocks_of(first)
    dense = _column(first.dense, blocks, kind)
    if not any(dense):
        return None
    kept = [_column(plan.pruned, blocks, kind) for plan in plans.values()]
    share = [[100 * of[row] / before if before else np.nan for of in kept] for row, before in enumerate(dense)]
    scale = Normalize(0, 100)
    figure, axes = _heat_map(np.array(share), scale, "kept share of the dense width (%)")
    cells = [(row, column) for row, before in enumerate(dense) if before for column in range(len(plans))]
    for row, column in cells:
        width, mark = kept[column][row], list(plans)[column]
        _tip(axes, f"run {mark}, block {blocks[row].label}: {_share_told(width, dense[row])}", column, row, 1, 1)
        if width and len(plans) <= FEW_HEADS:
            _cell(axes, row, column, str(width), scale(share[row][column]))
    removed = [(row, column + 0.5) for row, column in cells if not kept[column][row]]
    cross = _cross(axes, removed, "removed sub-layer")
    axes.set_xticks(np.arange(len(plans)) + 0.5, list(plans))
    axes.set_xlabel("run", size=_TEXT)
    _block_axis(axes, np.arange(len(blocks)) + 0.5, [block.label for block in blocks])
    if removed:
        _legend(axes, cross)
    return figure


def tradeoff(points: Sequence[Point], origins: Sequence[str], across: str, up: str) -> Figure:
    """Draw quality against cost: numbered circles for what runs made, diamonds for the dense models.

    Args:
        points: The models.
        origins: Names of the dense models.
        across: What the cost is.
        up: What the quality is.

    Returns:
        A figure.
    """
    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for point in points:
        colour = _ORIGINS[point.origin % len(_ORIGINS)]
        if point.mark:
            axes.plot(point.x, point.y, "o", markersize=14, color=colour, markeredgecolor=PAPER)
            box = {
                "boxstyle": "round,pad=0.3,rounding_size=0.9",
                "facecolor": colour,
                "edgecolor": "none",
            }  # of several
            where = {"ha": "center", "va": "center", "bbox": box}
            axes.text(point.x, point.y, point.mark, color=PAPER, size=_SMALL, weight="bold", **where)
        else:
            axes.plot(point.x, point.y, "D", markersize=8, color=PAPER, markeredgecolor=colour, markeredgewidth=1.8)
        _tip(axes, point.told, point.x, point.y)
    axes.margins(0.14)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if "%" in up:
        axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    axes.set_xlabel(across, size=_TEXT)
    axes.set_ylabel(up, size=_TEXT)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    _tidy(axes)
    shown = {point.origin for point in points if not point.mark}
    _legend(
        axes,
        [
            Line2D(
                [], [], color=PAPER, marker="D", markeredgecolor=_ORIGINS[index % len(_ORIGINS)], label=f"dense {name}"
            )
            for index, name in enumerate(origins)
            if index in shown
        ],
    )
    return figure


def _share_told(kept: int, of: int) -> str:
    return f"{kept} of {of} kept ({100 * kept / of:.0f} %)"


def training(report: Report) -> Figure:
    """Draw how training went: ADMM's residuals and penalty, then accuracy and loss of every stage.

    The stages stand one after the other, at the epochs trained so far; ``dense_retrained`` starts, as the
    pruning does, where ``dense`` ends. Panels without data are left out.

    Args:
        report: The report.

    Returns:
        A figure of one to three panels, one above the other.

    Raises:
        RunError: The report has neither an ADMM trace nor a training curve.
    """
    if not has_training(report):
        raise RunError("the report holds no training to draw: it has no admm.trace and all curves are empty")
    curves = {stage: epochs for stage in STAGES if (epochs := getattr(report.curves, stage))}
    trace = report.admm.trace if report.admm else ()
    scored = any(epoch.top1 is not None for epochs in curves.values() for epoch in epochs)
    panels = ["residuals"] * bool(trace) + ["top1"] * scored + ["loss"] * bool(curves)

    figure = Figure(figsize=(_WIDTH, 0.4 + 2.3 * len(panels)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)  # pyrefly: ignore
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _tidy(axes)
        if panel == "residuals":
            _draw_residuals(axes, trace)
        else:
            _draw_curves(axes, curves, panel)
    return figure


def has_training(report: Report) -> bool:
    """Tell whether there is anything for `training` to draw."""
    return bool(report.admm and report.admm.trace) or any(getattr(report.curves, stage) for stage in STAGES)


def _draw_residuals(axes: Axes, trace: Sequence[TraceStep]) -> None:
    epoch = [step.epoch for step in trace]
    lines = []
    for name, colour, marker in (("primal", KEPT, "o"), ("dual", REMOVED, "^")):
        lines += axes.plot(
            epoch, _positive(trace, name), color=colour, marker=marker, markersize=3, label=f"{name} residual"
        )
    _log_scale(axes, [getattr(step, name) for step in trace for name in ("primal", "dual")])
    axes.set_xlabel("epoch of the ADMM stage", size=_TEXT)
    axes.set_ylabel("relative residual", size=_TEXT)
    penalty = axes.twinx()
    lines += penalty.plot(epoch, _positive(trace, "rho"), "--", color=MUTED, label="penalty ρ (right axis)")
    _log_scale(penalty, [step.rho for step in trace])
    _tidy(penalty)
    penalty.spines["left"].set_visible(False)
    penalty.spines["right"].set_visible(True)
    penalty.set_ylabel("penalty ρ", size=_TEXT)
    _legend(axes, lines)
    for step in trace:
        told = (
            f"Z-step {step.step}: primal {step.primal:.3g}, dual {step.dual:.3g}, ρ {step.rho:.3g}, {step.flips} flips"
        )
        for value in filter(None, (step.primal, step.dual)):
            _tip(axes, told, step.epoch, value)


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Epoch]], metric: str) -> None:
    start = _stage_starts(curves)
    handles: list[Line2D] = []
    for stage, epochs in curves.items():
        colour, style, name = STAGES[stage]
        x = [start[stage] + epoch.epoch for epoch in epochs]
        y = np.array([getattr(epoch, metric) for epoch in epochs], dtype=float)
        known = ~np.isnan(y)
        handles += axes.plot(np.array(x)[known], y[known], style, color=colour, marker="o", markersize=3.5, label=name)
        for at, epoch in zip(x, epochs, strict=True):
            if (value := getattr(epoch, metric)) is not None:
                _tip(axes, f"{name}, epoch {epoch.epoch}: {_epoch_told(epoch)}", at, value)
        if metric == "loss":
            axes.plot(x, [epoch.train_loss for epoch in epochs], ":", color=colour)
    if metric == "loss":
        handles = [
            Line2D([], [], color=INK, marker="o", markersize=3.5, label="validation loss"),
            Line2D([], [], color=INK, linestyle=":", label="training loss"),
        ]
    axes.set_ylabel({"top1": "top-1 accuracy (%)", "loss": "loss (nats)"}[metric], size=_TEXT)
    axes.set_xlabel("epochs trained", size=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    _legend(axes, handles)


def _epoch_told(epoch: Epoch) -> str:
    top1 = "" if epoch.top1 is None else f"top-1 {epoch.top1:.1f} %, "
    loss = "" if epoch.loss is None else f"loss {epoch.loss:.3f}, "
    return f"{top1}{loss}training loss {epoch.train_loss:.3f}"


def _stage_starts(curves: Mapping[str, Sequence[Epoch]]) -> dict[str, int]:
    """Return the epochs trained before each stage."""
    length = {stage: curves[stage][-1].epoch if stage in curves else 0 for stage in STAGES}
    return {
        "dense": 0,
        "admm": length["dense"],
        "finetune": length["dense"] + length["admm"],
        "dense_retrained": length["dense"],
    }


def _positive(trace: Sequence[TraceStep], name: str) -> np.ndarray:
    """Return one column of the trace with zeros as gaps, for a log axis."""
    values = np.array([getattr(step, name) for step in trace], dtype=float)
    return np.where(values > 0, values, np.nan)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic, with plain decimal labels that do not crowd."""
    axes.set_yscale("log")
    positive = [value for value in values if value > 0]
    narrow = bool(positive) and max(positive) < 100 * min(positive)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _node(axes: Axes, place: np.ndarray, radius: float, stays: bool) -> None:
    size = 2 * radius
    if stays:
        axes.plot(*place, "o", markersize=size, color=KEPT, markeredgecolor=PAPER)
        return
    axes.plot(*place, "o", markersize=size, color=PAPER, markeredgecolor=REMOVED, markeredgewidth=1.2)
    axes.plot(*place, "x", markersize=size / 2, color=REMOVED, markeredgewidth=1.4)


def _block_axis(axes: Axes, places: np.ndarray, labels: Sequence[str]) -> None:
    axes.set_yticks(places, [elided(label) for label in labels], parse_math=False)
    axes.set_ylim(places[-1] + 0.5, places[0] - 0.5)  # the first to see the image on top
    axes.set_ylabel("block", size=_TEXT)


def elided(label: str) -> str:
    """A label that leaves room for the picture: of a long one, both ends."""
    half = _LONGEST_LABEL // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[:half]}…{label[-half:]}"


def _legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2 if len(handles) > 3 else 3,
        frameon=False,
        fontsize=_SMALL,
        borderpad=0.2,
        handlelength=1.8,
        columnspacing=1.4,
    )


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(LINE)
    axes.tick_params(labelsize=_SMALL, labelcolor=INK, color=LINE, length=3)
    axes.tick_params(which="minor", color=LINE, length=2)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
