"""Several runs on one page: what belongs together, what is told, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gohsp import cli, report
from gohsp.report import comparison, plots
from gohsp.report.html import render_comparison
from gohsp.report.schema import Report, parse
from reports import Page, edited, make_content, of_features, without, without_labels

SPEED = {"batch_size": 1, "dtype": "float32", "dense_ms": 20.0, "pruned_ms": 16.0}
SCRIPT = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    return make_content(2) | {"speed": SPEED}


def smaller(content: dict[str, Any], **pruned: Any) -> dict[str, Any]:
    """Another run on the same dense model: an FFN goes whole, and figures change."""
    content = without(content, "blocks.1.mlp")
    content["pruned"] |= {"params": 2_000_000, "macs": 100_000_000, "top1": 78.0} | pruned
    return content


def reports_of(*contents: dict[str, Any]) -> dict[str, Report]:
    return {name: parse(content) for name, content in zip("abcd", contents, strict=False)}


def test_runs_go_by_their_dense_model(first: dict[str, Any]) -> None:
    other = edited(first, "model/architecture", "vit_small")
    trained_anew = edited(first, "dense/top1", 80.0)
    reports = reports_of(first, other, without_labels(first), trained_anew)
    found = comparison.origins_of(reports)
    assert [list(origin.runs) for origin in found] == [["a", "c"], ["b"], ["d"]]
    assert [origin.name for origin in found] == ["deit_tiny_patch16_224 (1)", "vit_small", "deit_tiny_patch16_224 (3)"]
    assert found[0].dense.top1 == first["dense"]["top1"]
    backwards = comparison.origins_of({"c": reports["c"], "a": reports["a"]})
    assert [origin.dense.top1 for origin in backwards] == [first["dense"]["top1"]]  # told by the run that has it


def test_points_are_the_runs_and_their_dense_model(first: dict[str, Any]) -> None:
    reports = reports_of(first, smaller(first))
    (top1,) = comparison.measures_of(reports)
    params, macs, time = comparison.costs_of(reports)
    places = [(p.mark, p.x, p.y) for p in comparison.points_of(reports, params, top1)]
    assert places == [("", 5_525_000, 83.8), ("1", 3_315_000, 81.7), ("2", 2_000_000, 78.0)]
    assert [p.x for p in comparison.points_of(reports, macs, top1)] == [320e6, 176e6, 100e6]
    assert [p.x for p in comparison.points_of(reports, time, top1)] == [100, 80, 80]
    assert comparison.points_of(reports, params, top1)[2].told == "b: parameters 2.00 M, top-1 (%) 78.0"


def test_runs_in_one_place_share_a_point(first: dict[str, Any]) -> None:
    reports = reports_of(first, first, smaller(first))
    (top1,) = comparison.measures_of(reports)
    dense, both, third = comparison.points_of(reports, comparison.costs_of(reports)[0], top1)
    assert (dense.mark, both.mark, third.mark) == ("", "1, 2", "3")
    assert both.told == "; ".join(f"{name}: parameters 3.31 M, top-1 (%) 81.7" for name in "ab")


def test_time_of_several_dense_models_is_told_in_milliseconds(first: dict[str, Any]) -> None:
    other = edited(first, "model/architecture", "vit_small") | {"speed": SPEED | {"dense_ms": 30.0, "pruned_ms": 10.0}}
    reports = reports_of(first, other)
    time = comparison.costs_of(reports)[2]
    (top1,) = comparison.measures_of(reports)
    assert time.name == "milliseconds a batch"
    assert [p.x for p in comparison.points_of(reports, time, top1)] == [20, 30, 16, 10]
    untimed = reports_of(edited(first, "speed"), edited(first, "speed"))
    assert [cost.name for cost in comparison.costs_of(untimed)] == ["parameters", "MACs per image"]


def test_runs_without_labels_are_compared_by_fidelity(first: dict[str, Any]) -> None:
    plain, features = without_labels(first), edited(of_features(first), "fidelity/distance", 0.000123)
    names = [measure.name for measure in comparison.measures_of(reports_of(plain, plain))]
    assert names == ["agreement (%)", "distance (nats)"]
    mixed = reports_of(first, plain, features)
    measures = comparison.measures_of(mixed)
    assert [measure.name for measure in measures] == ["top-1 (%)", *names, "distance (of variance)"]
    cells = {row.mark or row.name: [value for value, _ in row.cells[3:]] for row in comparison.rows_of(mixed, measures)}
    assert cells["1"] == ["81.7 ± 0.9", "79.6 ± 3.6", "0.321", "–", "16"]
    assert cells["2"] == ["–", "79.6 ± 3.6", "0.321", "–", "16"]
    assert cells["3"] == ["–", "–", "–", "0.00012", "16"]
    assert cells["dense deit_tiny_patch16_224"][:2] == ["83.8 ± 0.8", "100.0"]


def test_rows_tell_changes_against_the_dense_model_of_the_run(first: dict[str, Any]) -> None:
    reports = reports_of(first, smaller(first))
    rows = list(comparison.rows_of(reports, comparison.measures_of(reports)))
    longer = "dense, trained as long as "
    assert [(row.mark, row.name) for row in rows] == [
        ("", "dense deit_tiny_patch16_224"),
        ("1", "a"),
        ("", f"{longer}1"),
        ("2", "b"),
        ("", f"{longer}2"),
    ]
    assert rows[3].cells == [
        ("params=-40%", "ADMM, cut and fine-tuned"),
        ("2.00 M", "−63.8 %"),
        ("100 M", "−68.8 %"),
        ("78.0 ± 0.9", "−5.8"),
        ("16", "1.25 ×"),
    ]


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("data/validation_split", "test", "scored on different images"),
        ("machine/processor", "Other", "different machines"),
        ("speed/batch_size", 8, "different machines or batches"),
        ("seed", 1, None),
    ],
)
def test_what_cannot_be_compared_is_said(first: dict[str, Any], path: str, value: Any, told: str | None) -> None:
    cautions = comparison.cautions(reports_of(first, edited(first, path, value)))
    assert len(cautions) == (told is not None)
    assert all(str(told) in caution for caution in cautions)


def test_fidelity_on_different_images_is_said(first: dict[str, Any]) -> None:
    plain = without_labels(first)
    (caution,) = comparison.cautions(reports_of(plain, edited(plain, "data/source", "elsewhere")))
    assert "fidelity with care" in caution


def test_the_page_shows_runs_and_plans_side_by_side(first: dict[str, Any]) -> None:
    reports = reports_of(first | {"speed": None}, smaller(first))
    html = render_comparison(reports)
    page = Page(html)
    assert page.labels() == [
        "Top-1 (%) against parameters",
        "Top-1 (%) against MACs per image",
        "Top-1 (%) against time (% of dense)",
        *(f"Kept {kind} by block and run" for kind in plots.KINDS.values()),
    ]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "b: parameters 2.00 M, top-1 (%) 78.0" in page.text
    assert "run 2, block 1, " not in page.text.replace("run 2, block 1, FFN", "")
    table = html[html.index("Widths of every block") :]
    rows = re.findall(r"<tr><td title.*?</tr>", table, re.DOTALL)
    cells = [re.sub("<.*?>", "|", row).strip("|") for row in rows]
    assert len(cells) == 8
    kept = first["plan"]["pruned"]["blocks.1.mlp"]["units"]
    assert re.split(r"\|+\s*", cells[7]) == ["1", "FFN units", "768", str(kept), "absent"]


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made and not drawn, which takes longest."""
    monkeypatch.setattr("gohsp.report.html._svg", lambda _figure, _name, label: f'<svg aria-label="{label}"></svg>')


@pytest.mark.usefixtures("_undrawn")
def test_plans_of_several_dense_models_stand_apart_and_names_are_escaped(first: dict[str, Any]) -> None:
    other = edited(make_content(3), "model/architecture", SCRIPT)
    page = Page(render_comparison({SCRIPT: parse(first), "items": parse(other)}))
    assert len([label for label in page.labels() if "Kept" in str(label)]) == 2 * len(plots.KINDS)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert f"What was cut of {SCRIPT}" in page.text


def test_kept_widths_are_told_cell_by_cell(first: dict[str, Any]) -> None:
    plans = {mark: parse(content).plan for mark, content in (("1", first), ("2", smaller(first)))}
    figure = plots.widths_beside(plans, "units")
    assert figure is not None
    axes = figure.axes[0]
    kept = [[of["plan"]["pruned"][f"blocks.{row}.mlp"]["units"] for of in (first, smaller(first))] for row in (0, 1)]
    assert axes.collections[0].get_array().tolist() == [[100 * width / 768 for width in row] for row in kept]
    assert [text.get_text() for text in axes.texts] == [str(width) for row in kept for width in row if width]
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[1.5, 1.5]]]
    figure.canvas.draw()
    told = [text for text, _ in plots.tips(figure)]
    assert told[-1] == "run 2, block 1: 0 of 768 kept (0 %)"
    assert plots.widths_beside({"1": parse(first).plan}, "heads") is not None


# The command


@pytest.fixture
def folders(first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two finished runs, in a folder where the command is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gohsp.report.html.render_html", lambda _: "a page")
    for name, content in (("runs/a", first), ("runs/b", smaller(first))):
        report.write(parse(content), tmp_path / name)
    return ["runs/a", "runs/b"]


@pytest.mark.usefixtures("_undrawn")
def test_the_command_writes_one_page_of_several_runs(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in Path("runs").rglob("*.*")}
    assert cli.main(["report", *folders, "--out", "pages/both.html"]) == 0
    told = capsys.readouterr().out
    assert "wrote pages/both.html" in told
    assert "2.00 M" in told
    assert "−63.8 %" in told
    text = Page(Path("pages/both.html").read_text(encoding="utf-8")).text
    assert "2 runs, pruned from deit_tiny_patch16_224" in text
    assert "2b" in text  # not runs/b
    assert {path: path.read_bytes() for path in Path("runs").rglob("*.*")} == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no run is named"),
        (["runs/a", "runs/../runs/a"], "'runs/../runs/a' is given twice"),
        (["runs/a", "runs/b", "--out", "both.json"], "must name a file that ends in .html"),
        (["runs/a", "--out", "a.html"], "give more runs"),
        (["runs/a", "runs/none"], "'runs/none/report.json' does not exist"),
        (["runs/a", "runs/begun"], "'runs/begun' holds a run that is not finished"),
        (["runs/begun"], "not finished"),
        (["runs/a", "runs/old"], "the first edition"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    folders: list[str], arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file, text in (("begun", "request.json", "{}"), ("old", "report.json", '{"schema_version": 3}')):
        Path("runs", name).mkdir()
        Path("runs", name, file).write_text(text)
    before = sorted(Path().rglob("*"))
    assert cli.main(["report", *arguments]) == 1
    said = capsys.readouterr()
    assert told in said.err
    assert said.out == ""
    assert sorted(Path().rglob("*")) == before
