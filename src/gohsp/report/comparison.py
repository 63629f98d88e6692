"""Several runs side by side: the dense models they began with, a table of all, points of pictures, and cautions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gohsp.report.schema import Metrics, Report
from gohsp.report.summary import METHODS, UNITS, distance_text, quantity, relative, signed, standard_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A dense model, and the runs that pruned it.

    Attributes:
        name: Its architecture, numbered where another dense model has the same.
        runs: Reports, by the runs' names.
    """

    name: str
    runs: Mapping[str, Report]

    @property
    def dense(self) -> Metrics:
        """Size of the dense model, with its scores where a run has them."""
        return max((run.dense for run in self.runs.values()), key=lambda metrics: metrics.top1 is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A way to tell how good a pruned model is.

    Attributes:
        name: What a column or an axis says.
        text: How a value is written.
        of_dense: Its value for a dense model.
        of_run: Its value for what a run made; None where it has none.
        images: How many images a run's value is a share of; None where it is no share, and has no standard error.
        drawn: Whether it has pictures, too; not where another one tells the same more plainly.
    """

    name: str
    text: Callable[[float], str]
    of_dense: Callable[[Metrics], float | None]
    of_run: Callable[[Report], float | None]
    images: Callable[[Report], int | None] = lambda _: None
    drawn: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """A way to tell what a model costs; attributes as of :class:`Measure`."""

    name: str
    of_dense: Callable[[Report], float | None]
    of_run: Callable[[Report], float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        mark: The run's number; empty for a dense model.
        name: The run's or the dense model's name.
        cells: A value and its change for each header behind the first.
    """

    mark: str
    name: str
    cells: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A model in a picture of quality against cost, or several in one place.

    Attributes:
        mark: The runs' numbers; empty for a dense model.
        origin: Which dense model it is, or was cut from.
        x: Cost.
        y: Quality.
        told: Both in words.
    """

    mark: str
    origin: int
    x: float
    y: float
    told: str


def origins_of(reports: Mapping[str, Report]) -> list[Origin]:
    """Runs by the dense models that they began with, in the order they are given."""
    groups: list[dict[str, Report]] = []
    for name, report in reports.items():
        group = next((group for group in groups if all(_same_dense(report, run) for run in group.values())), None)
        if group is None:
            groups.append({name: report})
        else:
            group[name] = report
    architectures = [next(iter(group.values())).model.architecture for group in groups]
    return [
        Origin(name=name if architectures.count(name) == 1 else f"{name} ({index})", runs=group)
        for index, (name, group) in enumerate(zip(architectures, groups, strict=True), 1)
    ]


def _same_dense(one: Report, other: Report) -> bool:
    a, b = one.dense, other.dense
    unscored = a.top1 is None or b.top1 is None
    built = one.model == other.model and one.plan.dense == other.plan.dense
    return built and (a.params, a.macs) == (b.params, b.macs) and (unscored or a == b)


def marks_of(reports: Mapping[str, Report]) -> dict[str, str]:
    """The runs' numbers, by their names."""
    return {name: str(number) for number, name in enumerate(reports, 1)}


# What is compared


def measures_of(reports: Mapping[str, Report]) -> list[Measure]:
    """What the runs can be compared by: accuracy where there are labels; where a run has none, fidelity too."""
    runs = reports.values()
    found = []
    if any(run.pruned.top1 is not None for run in runs):
        found.append(_TOP1)
    if all(run.pruned.top1 is not None for run in runs):
        return found
    compared = [run.fidelity for run in runs if run.fidelity]
    if any(fidelity.agreement is not None for fidelity in compared):
        found.append(_AGREEMENT)
    return found + [_distance(objective) for objective in dict.fromkeys(of.objective for of in compared)]


_TOP1 = Measure(
    name="top-1 (%)",
    text="{:.1f}".format,
    of_dense=lambda metrics: metrics.top1,
    of_run=lambda report: report.pruned.top1,
    images=lambda report: report.pruned.n,
)
_AGREEMENT = Measure(
    name="agreement (%)",
    text="{:.1f}".format,
    of_dense=lambda _: 100.0,
    of_run=lambda report: report.fidelity.agreement if report.fidelity else None,
    images=lambda report: report.fidelity.images if report.fidelity else None,
)


def _distance(objective: str) -> Measure:
    def of_run(report: Report) -> float | None:
        fidelity = report.fidelity
        return fidelity.distance if fidelity and fidelity.objective == objective else None

    return Measure(
        name=f"distance ({UNITS.get(objective, objective)})",
        text=distance_text,
        of_dense=lambda _: 0.0,
        of_run=of_run,
        drawn=objective != "classification",
    )


def costs_of(reports: Mapping[str, Report]) -> list[Cost]:
    """Parameters, MACs and, where it was measured, time.

    Time is told relative to that of the dense model, which took turns with the pruned one. Of several dense models it
    is told in milliseconds.
    """
    runs = reports.values()
    timed = [
        Cost(
            name="milliseconds a batch",
            of_dense=lambda report: report.speed.dense_ms if report.speed else None,
            of_run=lambda report: report.speed.pruned_ms if report.speed else None,
        )
        if len(origins_of(reports)) > 1
        else Cost(
            name="time (% of dense)",
            of_dense=lambda report: 100.0 if report.speed else None,
            of_run=lambda report: 100 * report.speed.pruned_ms / report.speed.dense_ms if report.speed else None,
        )
    ]
    return [
        Cost(name="parameters", of_dense=lambda run: run.dense.params, of_run=lambda run: run.pruned.params),
        Cost(name="MACs per image", of_dense=lambda run: run.dense.macs, of_run=lambda run: run.pruned.macs),
        *(timed if any(run.speed for run in runs) else []),
    ]


def points_of(reports: Mapping[str, Report], cost: Cost, measure: Measure) -> list[Point]:
    """The runs, and the dense models they began with, that have both figures; dense models first."""
    marks, points = marks_of(reports), []
    for index, origin in enumerate(origins_of(reports)):
        x = next(filter(None, map(cost.of_dense, origin.runs.values())), None)
        places = [("", f"dense {origin.name}", x, measure.of_dense(origin.dense))]
        places += [(marks[name], name, cost.of_run(run), measure.of_run(run)) for name, run in origin.runs.items()]
        points += [
            Point(mark=mark, origin=index, x=x, y=y, told=_told(name, cost, x, measure, y))
            for mark, name, x, y in places
            if x is not None and y is not None
        ]
    return _merged(sorted(points, key=lambda point: point.mark != ""))


def _merged(points: Sequence[Point]) -> list[Point]:
    """Points of which no two lie in the same place, where one would hide the other."""
    merged: dict[tuple[float, float, bool], Point] = {}
    for point in points:
        place = (point.x, point.y, point.mark == "")
        if (there := merged.get(place)) is not None:
            point = replace(
                point, mark=", ".join(filter(None, (there.mark, point.mark))), told=f"{there.told}; {point.told}"
            )
        merged[place] = point
    return list(merged.values())


def _told(name: str, cost: Cost, x: float, measure: Measure, y: float) -> str:
    size = quantity(x) if x >= 1000 else f"{x:.1f}"
    return f"{name}: {cost.name} {size}, {measure.name} {measure.text(y)}"


# The table


def headers_of(measures: Sequence[Measure]) -> tuple[str, ...]:
    """What stands above the table's columns."""
    return ("run", "asked for", "parameters", "MACs", *(measure.name for measure in measures), "ms a batch")


def rows_of(reports: Mapping[str, Report], measures: Sequence[Measure]) -> Iterator[Row]:
    """Each dense model with the runs that pruned it below."""
    marks = marks_of(reports)
    for origin in origins_of(reports):
        scores = [(of.of_dense(origin.dense), origin.dense.n if of is _TOP1 else None) for of in measures]
        yield _row("", f"dense {origin.name}", origin.dense, scores, measures)
        for name, run in origin.runs.items():
            made = (run.budget.requested, METHODS[run.method])
            scores = [(measure.of_run(run), measure.images(run)) for measure in measures]
            yield _row(marks[name], name, run.pruned, scores, measures, origin.dense, made, _time(run))
            if run.dense_retrained is not None:
                again, longer = run.dense_retrained, f"dense, trained as long as {marks[name]}"
                scores = [(again.top1, again.n) if measure is _TOP1 else (None, None) for measure in measures]
                yield _row("", longer, again, scores, measures, origin.dense)


def _row(
    mark: str,
    name: str,
    metrics: Metrics,
    scores: Sequence[tuple[float | None, int | None]],
    measures: Sequence[Measure],
    dense: Metrics | None = None,
    made: tuple[str, str] = ("", ""),
    time: tuple[str, str] = ("", ""),
) -> Row:
    """A row of scores, each with the number of images that it is a share of."""

    def sized(count: int, before: int | None) -> tuple[str, str]:
        return quantity(count), signed(relative(count, before), 1, " %") if before else ""

    def scored(measure: Measure, value: float | None, images: int | None) -> tuple[str, str]:
        if value is None:
            return "–", ""
        error = f" ± {standard_error(value, images):.1f}" if images else ""
        before = measure.of_dense(dense) if dense and measure is _TOP1 else None
        change = None if before is None else value - before
        return f"{measure.text(value)}{error}", signed(change, 1)

    params, macs = (dense.params, dense.macs) if dense else (None, None)
    scored_cells = [scored(measure, *score) for measure, score in zip(measures, scores, strict=True)]
    sizes = (sized(metrics.params, params), sized(metrics.macs, macs))
    return Row(mark=mark, name=name, cells=[made, *sizes, *scored_cells, time])


def _time(run: Report) -> tuple[str, str]:
    if run.speed is None:
        return "–", ""
    return f"{run.speed.pruned_ms:.3g}", f"{run.speed.dense_ms / run.speed.pruned_ms:.2f} ×"


# What a reader must know


def cautions(reports: Mapping[str, Report]) -> list[str]:
    """Why some figures of these runs cannot be compared."""
    runs = reports.values()
    scored = {
        (run.data.source, run.data.validation_split, run.data.image_size, run.pruned.n)
        for run in runs
        if run.pruned.top1 is not None
    }
    compared = {(run.data.source, run.data.train_split, run.data.image_size) for run in runs if run.pruned.top1 is None}
    timed = {
        (run.machine.device, run.machine.processor, run.machine.cores, run.speed.batch_size, run.speed.dtype)
        for run in runs
        if run.speed
    }
    told = []
    if len(scored) > 1:
        told.append("The runs were scored on different images: their accuracies cannot be compared.")
    if len(compared) > 1:
        told.append("The runs were held against their dense models on different images: compare fidelity with care.")
    if len(timed) > 1:
        told.append("Time was measured on different machines or batches: compare how many times as fast, not times.")
    return told
