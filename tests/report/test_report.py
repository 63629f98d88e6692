"""The report: schema, both files, the page and its pictures, on synthetic reports of two model sizes."""

from __future__ import annotations

import copy
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text
from pydantic import ValidationError

from gohsp.core import healing
from gohsp.core.ranking.ranking import HeadRanking, RankingSettings
from gohsp.errors import RunError, StorageError
from gohsp.report import (
    Heal,
    HealStep,
    Plan,
    Ranking,
    Report,
    headers,
    parse,
    plots,
    read,
    summary_table,
    write,
)
from gohsp.report.blocks import blocks_of
from gohsp.report.html import THEME, duration, index_ranges, render_html
from gohsp.report.summary import distance_text, quantity, signed
from gohsp.structure import AttentionWidths
from reports import Page, edited, make_content, of_features, one_shot, sampled, without, without_labels

SCRIPT = "<script>alert('x')</script>"


TINY = make_content()


@pytest.fixture(scope="module")
def tiny() -> Report:
    return parse(TINY)


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """The content of two blocks, where rendering should not cost time."""
    return make_content(2)


@pytest.fixture(scope="module")
def large() -> Report:
    return parse(make_content(12, 16, 4096, seed=1))


# --- schema ---------------------------------------------------------------------------------------------


def test_valid_reports_pass(tiny: Report, large: Report) -> None:
    for report in (tiny, large, parse(one_shot(TINY)), parse(without(TINY, "blocks.3.attn"))):
        assert parse(json.loads(report.model_dump_json())) == report
    assert json.loads(tiny.model_dump_json()) == json.loads(json.dumps(TINY)) | {
        "heal": None,
        "samples": None,
        "speed": None,
        "data": TINY["data"] | {"class_names": None},
    }


def test_a_report_is_built_of_typed_parts_and_cannot_be_changed(tiny: Report) -> None:
    parts = {name: getattr(tiny, name) for name in Report.model_fields}
    assert isinstance(parts["plan"], Plan)
    assert Report(**parts) == tiny
    plan = Plan(dense=tiny.plan.dense, pruned=tiny.plan.pruned, kept=tiny.plan.kept, stages=2)
    assert plan == tiny.plan
    assert plan.dense["blocks.0.attn"] == AttentionWidths(heads=3, qk=64, vo=64)
    with pytest.raises(ValidationError, match="frozen"):
        tiny.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="unknown key 'sead', did you mean 'seed'"):
        Report(**parts, sead=1)


def test_rankings_and_healing_are_taken_over_as_the_core_has_them(tiny: Report) -> None:
    content = {key: getattr(tiny.ranking, key) for key in Ranking.model_fields}
    settings = RankingSettings(**{key: content.pop(key) for key in RankingSettings.__dataclass_fields__})
    assert Ranking.of(HeadRanking(settings=settings, **content)) == tiny.ranking
    heal = Heal.of([healing.HealStep(0, None, 0.4), healing.HealStep(1, 0.9, 0.3), healing.HealStep(2, 0.8, 0.3)])
    assert heal.kept == 1  # the first of the best
    assert heal.curve[2] == HealStep(blocks=2, error=0.8, distance=0.3)


@pytest.mark.parametrize(
    "path",
    [
        "schema_version",
        "budget",
        "method",
        "pruned/top1",
        "plan/kept",
        "plan/pruned/blocks.3.mlp",
        "plan/pruned/blocks.3.attn/heads",
        "ranking/transition",
        "ranking/scores/blocks.2.attn",
        "admm/trace/2/rho",
        "admm/loss_after_cut",
        "curves/finetune/0/loss",
        "equality/tolerance",
        "fidelity/objective",
        "config",
    ],
)
def test_missing_key_is_named(path: str) -> None:
    with pytest.raises(RunError, match=rf"\b{path.split('/')[-1]}\b"):
        parse(edited(TINY, path, drop=True))


@pytest.mark.parametrize(
    ("path", "misspelt", "meant"),
    [
        ("equalitty", "equalitty", "equality"),
        ("pruned/top_1", "top_1", "top1"),
        ("plan/dense/blocks.0.mlp/unit", "unit", "units"),
        ("plan/stage", "stage", "stages"),
        ("curves/fine_tune", "fine_tune", "finetune"),
        ("ranking/dampening", "dampening", "damping"),
    ],
)
def test_misspelt_key_is_named_with_the_right_one(path: str, misspelt: str, meant: str) -> None:
    with pytest.raises(RunError, match=rf"unknown key '{misspelt}'[,;] (did you mean|valid:) '{meant}'"):
        parse(edited(TINY, path, 1))


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        ("pruned/params", "3.3M", r"'pruned\.params'.*'3\.3M'"),
        ("pruned/params", 3.5, r"'pruned\.params'.*3\.5"),
        ("pruned/top1", 101.0, r"'pruned\.top1'.*101"),
        ("pruned/loss", float("nan"), r"'pruned\.loss'"),
        ("config/train/lr", float("inf"), r"'config\.train.*inf"),
        ("config/train/lr", {1: 2}, r"'config\.train.*valid string"),
        ("model/arguments/act", print, r"'model\.arguments\.act'.*JSON"),
        ("budget/kind", "flops", r"'budget\.kind'.*'flops'"),
        ("method", "train", r"'method'.*'train'"),
        ("created", "2025-11-22T17:30:00", r"'created'.*UTC"),
        ("created", "2025-11-22T17:30:00+02:00", r"'created'.*UTC"),
        ("created", "yesterday", r"'created'.*yesterday"),
        ("admm/trace/4/primal", -1.0, r"'admm\.trace\[4\]\.primal'.*-1"),
        ("fidelity/objective", "features", r"'fidelity': agreement is there for the objective 'classification'"),
        ("fidelity/agreement", None, r"'fidelity': agreement is there for the objective 'classification'"),
        ("plan/kept/blocks.1.attn/heads", [0, 0], r"'blocks\.1\.attn': 'heads' must be ascending.*\(0, 0\)"),
        (
            "plan/kept/blocks.2.attn/heads",
            [0, 1, 3],
            r"'blocks\.2\.attn': 'heads' must be .* from 0 to 2, got \(0, 1, 3\)",
        ),
        ("plan/kept/blocks.2.mlp/units", [0, 768], r"'blocks\.2\.mlp': 'units' must be .* from 0 to 767"),
        ("plan/kept/blocks.0.attn/heads", "all", r"'plan\.kept': 'blocks\.0\.attn' .* must be lists of indices"),
        ("plan/pruned/blocks.5.mlp/units", 8, r"'blocks\.5\.mlp' keeps .*units=\d+.*pruned widths are .*units=8"),
        ("plan/pruned/blocks.5.mlp/units", -8, r"'plan\.pruned': 'blocks\.5\.mlp'.*at least 0, got -8"),
        ("plan/pruned/blocks.5.attn/qk", 0, r"'plan\.pruned': 'blocks\.5\.attn'.*no width of 0, or all of them"),
        ("plan/pruned/blocks.5.attn", {"units": 8}, r"'blocks\.5\.attn' is an attention in one"),
        ("plan/kept/blocks.0.attn/qk", [], r"'blocks\.0\.attn': 'qk' must list equally many .* 2 kept heads"),
        ("plan/pruned", {}, r"dense and pruned differ in \['blocks\.0\.attn'"),
        ("plan/dense", [], r"'plan\.dense': .*a table for each sub-layer"),
        ("ranking/transition/blocks.6.attn", [[1.0]], r"transition\['blocks\.6\.attn'\] is not 3 x 3"),
        (
            "ranking/transition/blocks.6.attn/1",
            [0.5, 0.0, 0.4],
            r"transition\['blocks\.6\.attn'\]\[1\] sums to 0\.9, must",
        ),
        ("ranking/scores", {}, r"transition and scores differ in \['blocks\.0\.attn'"),
    ],
)
def test_wrong_value_is_named(path: str, value: Any, names: str) -> None:
    with pytest.raises(RunError, match=names):
        parse(edited(TINY, path, value))


def test_scores_must_cover_the_plans_heads() -> None:
    content = edited(TINY, "ranking/scores/blocks.0.attn", [0.5, 0.5])
    content["ranking"]["transition"]["blocks.0.attn"] = [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(RunError, match=r"left_at\['blocks\.0\.attn'\] is not of 2 heads, as its 2 scores are"):
        parse(content)
    content["ranking"]["left_at"]["blocks.0.attn"] = [1, 1]
    with pytest.raises(RunError, match=r"ranking\.scores has 2 heads of 'blocks\.0\.attn', plan\.dense has 3"):
        parse(content)
    with pytest.raises(RunError, match=r"ranking\.scores has 0 heads of 'blocks\.0\.attn', plan\.dense has 3"):
        parse(edited(edited(TINY, "ranking/scores", {}), "ranking/transition", {}))


def test_a_global_chain_is_scaled_to_each_attention() -> None:
    wide = edited(TINY, "ranking/scope", "global")
    parse(wide)
    with pytest.raises(RunError, match=r"sums to 0\.15, must be 1"):
        parse(edited(wide, "ranking/transition/blocks.6.attn/0", [0.0, 0.1, 0.05]))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_reports_of_the_first_edition_are_refused_in_one_clear_sentence(
    small: dict[str, Any], tmp_path: Path, version: int
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(small | {"schema_version": version, "recipe": {}}))
    with pytest.raises(
        RunError, match=rf"schema_version {version}, which gohsp 0\.1 .* reads; this gohsp reads 4"
    ) as told:
        read(tmp_path)
    assert "recipe" not in str(told.value)


def test_other_schema_version_says_so() -> None:
    with pytest.raises(RunError, match=r"schema_version 5, this gohsp reads 4: use the gohsp that wrote it"):
        parse(edited(TINY, "schema_version", 5))


def test_not_an_object() -> None:
    with pytest.raises(RunError, match="got list"):
        parse([])


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures")
def test_reading_imports_no_library_that_draws_or_computes(small: dict[str, Any], tmp_path: Path) -> None:
    write(parse(small), tmp_path)
    script = (
        "import sys; from pathlib import Path; import gohsp.report;"
        "rows = gohsp.report.summary_table(gohsp.report.read(Path(sys.argv[1])));"
        "print(len(rows), *{'matplotlib', 'jinja2', 'torch', 'timm', 'gohsp.core'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["3"]


@pytest.mark.usefixtures("no_pictures")
def test_write_then_read_is_identity(small: dict[str, Any], tmp_path: Path) -> None:
    report = parse(small)
    write(report, tmp_path / "run")
    assert read(tmp_path / "run") == report
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "run" / "report.json").read_text().startswith('{\n  "schema_version": 4,')
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == render_html(report)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("fails", ["write", "replace"])
def test_failing_write_leaves_the_old_files(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    write(parse(one_shot(small)), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        real(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    if fails == "write":
        monkeypatch.setattr(Path, "write_bytes", half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=r"report\.html' cannot be written"):
        write(parse(small), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.usefixtures("no_pictures")
def test_files_are_readable_by_others_as_the_umask_says(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(parse(one_shot(small)), tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_read_names_the_file_and_the_fault(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"report\.json' does not exist"):
        read(tmp_path)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(small)[:100])
    with pytest.raises(RunError, match=r"report\.json' cannot be read as JSON"):
        read(tmp_path)
    path.write_text(json.dumps(edited(small, "seed", drop=True)))
    with pytest.raises(RunError, match=r"report\.json': .*'seed' is missing"):
        read(tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_a_report_that_was_changed_is_refused_however_plausible(small: dict[str, Any], tmp_path: Path) -> None:
    write(parse(small), tmp_path)
    path = tmp_path / "report.json"
    whole = path.read_text()
    assert whole.count("83.8") == 1
    path.write_text(whole.replace("83.8", "93.8"))
    with pytest.raises(RunError, match=r"report\.json' is not as it was written"):
        read(tmp_path)
    path.write_text(json.dumps(small))  # no digest
    with pytest.raises(RunError, match=r"report\.json' is not as it was written"):
        read(tmp_path)
    path.write_text(json.dumps(json.loads(whole)))  # laid out otherwise
    assert read(tmp_path) == parse(small)


# --- the table ------------------------------------------------------------------------------------------


def test_summary_numbers(tiny: Report) -> None:
    dense, retrained, pruned = summary_table(tiny)
    assert [row.model for row in (dense, retrained, pruned)] == ["dense", "dense, trained longer", "pruned"]
    assert dense.params_change is None
    assert dense.loss_change is None
    assert pruned.params_change == pytest.approx(-40.0)  # 5.525 M -> 3.315 M
    assert pruned.macs_change == pytest.approx(-45.0)  # 320 M -> 176 M
    assert pruned.top1_change == pytest.approx(-2.1)
    assert pruned.top5_change == pytest.approx(-0.5)
    assert pruned.loss_change == pytest.approx(0.09)
    assert retrained.params_change == 0
    assert retrained.top1_change == pytest.approx(0.45)
    # Binomial: sqrt(0.838 * 0.162 / 2000) = 0.824 %
    assert dense.top1_error == pytest.approx(0.824, abs=5e-4)
    assert len(pruned.cells()) == len(headers(tiny))
    assert pruned.cells() == [
        ("pruned", ""),
        ("3.31 M", "−40.0 %"),
        ("176 M", "−45.0 %"),
        ("81.7 ± 0.9", "−2.1"),
        ("98.0", "−0.5"),
        ("0.610", "+0.090"),
    ]


def test_summary_without_retrained() -> None:
    assert [row.model for row in summary_table(parse(one_shot(TINY)))] == ["dense", "pruned"]


def test_texts_of_numbers() -> None:
    assert [quantity(n) for n in (7, 1234, 5_717_416, 22_000_000, 907_000_000, 1_258_000_000)] == [
        "7",
        "1.23 k",
        "5.72 M",
        "22.0 M",
        "907 M",
        "1.26 G",
    ]
    assert [signed(x, 1) for x in (None, -0.04, 0.0, 0.06, -12.34)] == ["", "±0.0", "±0.0", "+0.1", "−12.3"]
    texts = ["0.000", "0.321", "0.001", "0.00049", "0.00012", "1.3e-07"]
    assert [distance_text(d) for d in (0.0, 0.321, 0.0006, 0.00049, 0.000123, 1.26e-7)] == texts
    assert [duration(s) for s in (0.44, 34.2, 185, 3599.7, 7800)] == [
        "0.4 s",
        "34 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 10 min",
    ]
    assert [index_ranges(i) for i in ([], [3], [0, 1, 2, 5], [0, 2, 3])] == ["none", "3", "0–2, 5", "0, 2–3"]


# --- the page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def html(tiny: Report) -> str:
    return render_html(tiny)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_loads_nothing_and_runs_nothing(html: str, page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "image", "iframe", "object", "base"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert (value or "").startswith("#")
    assert all("w3.org" in address for address in re.findall(r"https?://[^\"' <]+", html))  # XML namespaces
    assert not re.search(r"@import|url\((?!#)", html)


def test_what_scrolls_is_reached_by_keyboard_and_has_a_name(page: Page) -> None:
    regions = [of for _, of in page.tags if "scroll" in (of.get("class") or "").split()]
    assert [of["aria-label"] for of in regions] == [
        "Before and after",
        "Widths and kept heads of every block",
        "Time of every step",
        "Figures of every epoch",
    ]
    assert all((of["tabindex"], of["role"]) == ("0", "region") for of in regions)


def test_ids_are_unique_and_references_hit(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [a["xlink:href"] for _, a in page.tags if "xlink:href" in a]
    clips = [a["clip-path"] for _, a in page.tags if "clip-path" in a]
    targets = {str(u)[1:] for u in used} | {str(c)[5:-1] for c in clips}
    assert targets
    assert targets <= set(ids)


def test_every_picture_is_there(page: Page) -> None:
    labels = page.labels()
    assert "Kept widths by block and kind" in labels
    assert "Importance of every head" in labels
    assert "The course of training over the epochs" in labels
    assert [label for label in labels if label and "Markov" in label] == [
        f"Markov chain on the heads of block {block}" for block in range(12)
    ]
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all("viewbox" in a and "width" not in a and "height" not in a for a in pictures)


def test_page_shows_the_table_and_the_checks(page: Page) -> None:
    for text in ("−40.0 %", "−45.0 %", "81.7 ± 0.9", "5.53 M → 3.31 M", "−2.5 against dense trained longer"):
        assert text in page.text
    assert "3.0e-07" in page.text
    assert "gohsp prune 'settings/deit tiny.toml' --budget params=-40%" in page.text
    kept = sum(len(table.get("heads", ())) for table in TINY["plan"]["kept"].values())
    assert f"{kept} of 36" in page.text
    assert "ADMM, cut and fine-tuned" in page.text


def test_tables_hold_what_pictures_tell(html: str, tiny: Report) -> None:
    rows = table_rows(html, "Widths and kept heads")
    assert [row[6].split(", ") for row in rows] == [
        [f"{score:.4f}" for score in scores] for scores in tiny.ranking.scores.values()
    ]
    epochs = table_rows(html, "Figures of every epoch")
    assert len(epochs) == 5 + 1 + 2 + 3
    assert epochs[0] == ["dense", "1", "55.0", "1.100", "1.300"]


def test_page_of_a_run_without_training(small: dict[str, Any]) -> None:
    page = Page(render_html(parse(one_shot(small))))
    assert "The course of training over the epochs" not in page.labels()
    assert "ADMM" not in page.text
    assert "trained longer" not in page.text


@pytest.mark.usefixtures("no_pictures")
def test_page_without_labels_shows_agreement_instead_of_accuracy(small: dict[str, Any]) -> None:
    report = parse(without_labels(small))
    page = Page(render_html(report))
    assert "Agrees with dense" in page.text
    assert "79.6 %" in page.text
    assert "No labels were read" in page.text
    assert "Top-1 accuracy" not in page.text
    assert "1,024 images without labels" in page.text
    assert page.text.index("Agrees with dense") < page.text.index("MACs per image")  # it leads
    assert headers(report)[3:] == ("agreement (%)", "distance (nats)")
    assert [row.cells()[3:] for row in summary_table(report)] == [
        [("100.0", ""), ("0.000", "")],
        [("79.6 ± 3.6", ""), ("0.321", "")],  # of 128 images
    ]
    bare = without_labels(small) | {"fidelity": None, "command": []}
    text = Page(render_html(parse(edited(bare, "data/calibration_images", None)))).text
    assert "Agrees with dense" not in text
    assert "Right after the cut" not in text
    assert "Command" not in text
    assert "(nats)" not in text


def test_scores_are_complete_or_absent(small: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="all of top1, top5, loss and n"):
        parse(edited(without_labels(small), "pruned/top1", 50.0))


def test_fidelity_is_told_in_nats_for_classes(page: Page) -> None:
    assert "is the dense one's for 79.6 % and its predictions diverge by" in page.text
    assert "0.321 nats (0.250 predicted)" in page.text


def test_fidelity_is_told_as_a_share_of_the_variance_for_features(small: dict[str, Any]) -> None:
    text = Page(render_html(parse(of_features(small)))).text
    assert "Distance to dense" in text
    assert "MyBackbone, pruned" in text
    assert re.search(r"half the mean squared difference .*\n.*0\.321 of the outputs' variance\.", text)
    assert "tells no classes apart" in text
    assert "distance (of variance)" in text
    for wrong in ("nats", "agree", "first prediction", "classes ·", "Model arguments", "None", "predicted)"):
        assert wrong not in text


@pytest.mark.usefixtures("no_pictures")
def test_fidelity_by_the_users_own_objective(small: dict[str, Any]) -> None:
    boxes = edited(of_features(small, "boxes"), "fidelity/distance", 0.000123)
    text = Page(render_html(parse(boxes))).text
    assert "0.00012 by the objective “boxes”" in text
    assert text.count("0.00012") == 3  # in a tile and in the table, too
    assert "variance" not in text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("kept", "told"), [(1, "kept as it was after 1 of 2 windows"), (0, "No window of healing helped")]
)
def test_healing_is_told(small: dict[str, Any], kept: int, told: str) -> None:
    distances = enumerate((0.4, 0.321, 0.5))
    curve = [{"blocks": n, "error": None if n == 0 else 0.9, "distance": distance} for n, distance in distances]
    text = Page(render_html(parse(small | {"heal": {"kept": kept, "curve": curve}}))).text
    assert told in text
    assert "After the cut and its healing" in text
    assert ("0.400 nats" in text) == bool(kept)
    with pytest.raises(RunError, match="kept names 3 blocks"):
        parse(small | {"heal": {"kept": 3, "curve": curve}})


def test_page_with_curves_but_no_admm(small: dict[str, Any]) -> None:
    content = {key: value for key, value in small.items() if key != "admm"}
    page = Page(render_html(parse(content | {"curves": {"finetune": small["curves"]["finetune"]}})))
    assert "The course of training over the epochs" in page.labels()


def irregular() -> dict[str, Any]:
    """Of eight blocks one lacks an attention, one an FFN; two sub-layers go whole, one had gone; widths differ."""
    content = make_content(8, seed=4)
    plan, ranking = content["plan"], content["ranking"]
    for name in ("blocks.1.attn", "blocks.6.mlp"):
        for table in (plan["dense"], plan["pruned"], plan["kept"], ranking["scores"], ranking["transition"]):
            table.pop(name, None)
    plan["dense"]["blocks.7.mlp"]["units"] = 1024
    for name in ("blocks.2.attn", "blocks.4.mlp", "blocks.5.attn"):
        content = without(content, name)
    content["plan"]["dense"]["blocks.5.attn"] = {"heads": 0, "qk": 0, "vo": 0}
    for key in ("scores", "transition"):
        del content["ranking"][key]["blocks.5.attn"]
    return content


def test_page_of_sublayers_that_are_absent_or_lacking() -> None:
    html = render_html(parse(irregular()))
    page = Page(html)
    assert "Removed whole: blocks.2.attn, blocks.4.mlp." in page.text
    assert "2 of 14 sub-layers removed whole" in page.text
    graphs = [label for label in page.labels() if label and "Markov" in label]
    assert [label.split()[-1] for label in graphs] == ["0", "2", "3", "4", "6", "7"]
    rows = {row[0]: row[1:] for row in table_rows(html, "Widths and kept heads")}
    assert list(rows) == [str(block) for block in range(8)]
    assert [*rows["1"][:3], rows["1"][4]] == ["–"] * 4
    assert rows["2"][:3] == ["absent of 3", "absent of 64", "absent of 64"]
    assert rows["2"][4] == "none"
    assert rows["4"][3] == "absent of 768"
    assert rows["5"][:3] == ["absent"] * 3
    assert rows["6"][3] == "–"
    assert rows["7"][3].endswith(" of 1024")


def table_rows(html: str, title: str) -> list[list[str]]:
    """The cells of the table under a title, as plain text."""
    table = re.search(rf"{title}.*?<tbody>(.*?)</tbody>", html, re.DOTALL)
    assert table
    rows = re.findall(r"<tr>(.*?)</tr>", table[1], re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows]


def test_page_of_a_network_without_attentions(small: dict[str, Any]) -> None:
    content = copy.deepcopy(small)
    for table in (*(content["plan"][key] for key in ("dense", "pruned", "kept")), content["ranking"]["scores"]):
        for name in ("blocks.0.attn", "blocks.1.attn"):
            del table[name]
    report = parse(edited(content, "ranking/transition", {}))
    page = Page(render_html(report))
    assert "Importance of every head" not in page.labels()
    assert "graph of heads" not in page.text
    assert [axes.get_title() for axes in plots.kept_widths(report).axes] == ["FFN units\nof 768"]
    with pytest.raises(RunError, match="no heads to draw"):
        plots.head_importance(report)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp"], ["0", "1"]),
        (["enc.layers.encoder_layer_0.self_attention", "enc.layers.encoder_layer_1.mlp"], ["0", "1"]),
        (["vit.layer.0.attention.attention", "vit.layer.0.mlp", "vit.layer.1.mlp"], ["0", "1"]),
        (["layers.0.blocks.0.attn", "layers.0.blocks.0.mlp", "layers.1.blocks.0.attn"], ["0.0", "1.0"]),
        (["image.layers.0.attn", "text.layers.0.attn"], ["image.layers.0", "text.layers.0"]),
        (["stem.attn", "stem.mlp", "blocks.0.attn"], ["stem", "0"]),
        (["blocks.0.attn", "blocks.0.mlp1", "blocks.0.mlp2"], ["0", "0"]),
        (["attn", "mlp"], ["attn", "mlp"]),
    ],
)
def test_blocks_have_short_distinct_labels(names: list[str], labels: list[str]) -> None:
    widths = {n: {"heads": 1, "qk": 1, "vo": 1} if "att" in n.split(".")[-1] else {"units": 2} for n in names}
    kept = {
        n: {"units": [0, 1]} if "units" in of else {"heads": [0], "qk": [[0]], "vo": [[0]]} for n, of in widths.items()
    }
    blocks = blocks_of(Plan(dense=widths, pruned=widths, kept=kept))  # type: ignore[arg-type]
    assert [block.label for block in blocks] == labels
    assert [name for block in blocks for name in (block.attention, block.ffn) if name] == names


def test_a_few_images_are_shown_with_what_heads_and_models_make_of_them(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gohsp.report.html._svg", lambda *_: "<svg></svg>")  # drawing takes longest
    content = sampled(small)
    html = render_html(parse(content))
    page = Page(html)
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(str(of["src"]).startswith("data:image/webp;base64,") for of in shown)
    told = [str(of["alt"]) for of in shown]
    assert told[:9] == [
        f"{what} {image}"
        for what in ("held-out image", "the dense model's output for image", "the pruned model's output for image")
        for image in (1, 2, 3)
    ]
    assert told[12:] == [f"where head {head} looks in image {image}" for head in (2, 0) for image in (1, 2, 3)]
    kept = content["plan"]["kept"]["blocks.0.attn"]["heads"]
    fates = re.findall(r"head (\d)\s*(kept|removed)", re.sub("<.*?>", " ", html))
    assert fates[:2] == [(str(head), "kept" if head in kept else "removed") for head in (2, 0)]
    heads_alone = {key: content["samples"][key] for key in ("images", "heads")}
    assert "Outputs before and after" not in Page(render_html(parse(content | {"samples": heads_alone}))).text


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("samples/images", ["x' onload='"], r"'samples\.images\[0\]'.*pattern"),
        ("samples/before", [], r"have 0 and 3 pictures for 3 images"),
        ("samples/after", ["AAAA"], r"have 3 and 1 pictures for 3 images"),
        ("samples/heads/0/maps", [], r"head 2 of 'blocks\.0\.attn' has 0 maps for 3 images"),
        ("samples/heads/0/head", 3, r"samples\.heads names head 3 of 'blocks\.0\.attn', which is not ranked"),
    ],
)
def test_samples_fit_each_other(small: dict[str, Any], path: str, value: Any, told: str) -> None:
    with pytest.raises(RunError, match=told):
        parse(edited(sampled(small), path, value))


def test_large_model_renders(large: Report) -> None:
    html = render_html(large)
    assert len(Page(html).labels()) == 3 + 12
    assert len(html) < 2_000_000


def test_untrusted_text_is_escaped(small: dict[str, Any]) -> None:
    report = json.loads(json.dumps(small).replace("blocks.", f"{SCRIPT}."))
    report["model"]["architecture"] = report["data"]["source"] = report["machine"]["processor"] = SCRIPT
    report["ranking"]["edge"] = report["ranking"]["method"] = report["admm"]["status"] = SCRIPT
    report["ranking"]["notes"] = ["<img src=x onerror=alert(1)>"]
    report["command"] = ["gohsp", "</pre>" + SCRIPT]
    report["config"] = report["model"]["arguments"] = {SCRIPT: {"x": [SCRIPT, "</pre>", "$\\frac{"]}}
    report["versions"] = report["versions"] | {"items": SCRIPT}
    report["timings"] = {SCRIPT: 1.0, "values": 2.0}
    page = Page(render_html(parse(report)))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.text.count("alert('x')") >= 10


@pytest.mark.usefixtures("no_pictures")
def test_class_names_are_shown_shortened_and_escaped(small: dict[str, Any]) -> None:
    names = [SCRIPT, *(f"class {number}" for number in range(1, small["data"]["classes"]))]
    report = edited(small, "data/class_names", names)
    page = Page(render_html(parse(report)))
    assert SCRIPT + ", class 1, " in page.text
    assert not [tag for tag, _ in page.tags if tag == "script"]
    many = edited(edited(small, "data/classes", 1000), "data/class_names", [f"c{number}" for number in range(1000)])
    text = Page(render_html(parse(many))).text
    assert "c18, c19 and 980 more" in text
    assert "c20" not in text
    with pytest.raises(RunError, match=r"data.*class_names has 3 names for 10 classes"):
        parse(edited(small, "data/class_names", ["a", "b", "c"]))


@pytest.mark.usefixtures("no_pictures")
def test_warnings_are_shown_where_due(small: dict[str, Any], page: Page) -> None:
    assert not any(attributes.get("class") == "warn" for _, attributes in page.tags)
    report = edited(small, "admm/status", "epochs_over")
    report["data"]["unreadable_images"] = 7
    report["ranking"]["notes"] = ["block 3 is reducible"]
    report["budget"]["achieved"] = 4_000_000
    report["equality"]["max_relative_difference"] = 0.1
    text = Page(render_html(parse(report))).text
    for part in (
        "did not converge; it ended with status “epochs_over”",
        "7 images could not be read",
        "block 3 is reducible",
        "budget is not met",
    ):
        assert part in text
    assert "does not compute what the masked dense model computes" in text
    assert "exceeded by 20.63 %" in text


def told_of(figure: Any) -> list[tuple[str, tuple[float, float, float, float]]]:
    FigureCanvasAgg(figure).draw()
    return plots.tips(figure)


def test_every_value_is_told_where_it_is_pointed_at(small: dict[str, Any]) -> None:
    report = parse(small)
    plan, scores = report.plan, report.ranking.scores["blocks.1.attn"]
    widths = dict(told_of(plots.kept_widths(report)))
    kept = plan.pruned["blocks.1.mlp"].units  # type: ignore[union-attr]
    assert f"block 1, FFN units: {kept} of 768 kept ({100 * kept / 768:.0f} %)" in widths
    assert len(widths) == 2 * 4
    importance = dict(told_of(plots.head_importance(report)))
    fate = "kept" if 2 in plan.kept_heads("blocks.1.attn") else "removed"
    assert f"block 1, head 2: score {scores[2]:.4f}, {fate}, last ranked in step 1" in importance
    assert len(importance) == 2 * 3
    ((told, _), *others) = told_of(plots.head_graph([[0.5, 0.5], [1.0, 0.0]], [0.6, 0.4]))
    assert told == "head 0, 0.6000; moves on to 1 (0.50)"
    assert len(others) == 1
    training = [text for text, _ in told_of(plots.training(report))]
    assert "pruned, fine-tuned, epoch 2: top-1 81.3 %, loss 0.573, training loss 0.773" in training
    assert "Z-step 0: primal 0.6, dual 0, ρ 0.004, 40 flips" in training


def test_places_to_point_at_lie_on_what_they_tell_of(small: dict[str, Any]) -> None:
    figure = plots.head_importance(parse(small))
    boxes = dict(told_of(figure))
    axes = figure.axes[0].get_position()
    left, top, width, height = boxes[next(text for text in boxes if text.startswith("block 0, head 0:"))]
    assert left == pytest.approx(100 * axes.x0)
    assert top == pytest.approx(100 * (1 - axes.y1))
    assert (width, height) == pytest.approx((100 * axes.width / 3, 100 * axes.height / 2))
    points = plots.training(parse(small))
    (at, *_) = [box for text, box in told_of(points) if text.startswith("dense, epoch 1:")]
    x, y = points.axes[1].transData.transform((1, small["curves"]["dense"][0]["top1"]))
    whole = points.bbox
    assert at[0] + at[2] / 2 == pytest.approx(100 * x / whole.width)
    assert at[1] + at[3] / 2 == pytest.approx(100 * (1 - y / whole.height))


def test_pictures_follow_the_page_light_or_dark(html: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not [colour for colour in THEME if colour in pictures]
    assert {f"var(--{name})" for name in THEME.values()} - set(re.findall(r"var\(--[\w-]+\)", pictures)) == set()
    style = html[html.index("<style>") : html.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert all(f"--{name}:" in light and f"--{name}:" in dark for name in THEME.values())


# --- the pictures ---------------------------------------------------------------------------------------


def assert_texts_apart(figure: Any) -> None:
    """No two texts of a figure overlap, and none is cut off by its border."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # Matplotlib keeps labels of ticks outside the view, undrawn; they do not count.
    undrawn = [label for axis in figure.findobj(Axis) for label in labels_outside(axis)]
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in undrawn]
    shown = [t for t in texts if t.get_window_extent(renderer).width > 0]
    boxes = [t.get_window_extent(renderer).padded(-0.5) for t in shown]
    border = figure.bbox
    for text, box in zip(shown, boxes, strict=True):
        assert border.x0 <= box.x0, text.get_text()
        assert box.x1 <= border.x1, text.get_text()
        assert border.y0 <= box.y0, text.get_text()
        assert box.y1 <= border.y1, text.get_text()
    for i, box in enumerate(boxes):
        for j in range(i):
            assert not box.overlaps(boxes[j]), (shown[i].get_text(), shown[j].get_text())


def labels_outside(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if not low <= tick.get_loc() <= high]
    return [label for tick in ticks for label in (tick.label1, tick.label2)]


@pytest.mark.parametrize(("blocks", "heads", "ffn"), [(12, 3, 768), (24, 16, 4096), (40, 8, 11008), (1, 1, 100)])
def test_nothing_overlaps(blocks: int, heads: int, ffn: int) -> None:
    report = parse(make_content(blocks, heads, ffn, seed=2))
    for draw in (plots.head_importance, plots.kept_widths, plots.training):
        assert_texts_apart(draw(report))


def test_nothing_overlaps_where_names_are_long_and_sublayers_absent() -> None:
    content = json.dumps(irregular())
    towers = content.replace("blocks.0", "vision_model.encoder.layers.0").replace(
        "blocks.1", "text_model.encoder.layers.0"
    )
    for report in (parse(json.loads(content)), parse(json.loads(towers))):
        for draw in (plots.head_importance, plots.kept_widths):
            assert_texts_apart(draw(report))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 9, 12, 16, 24])
@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("left_at", [(), range(3, 27)])
def test_graph_labels_do_not_overlap(heads: int, key: bool, left_at: Sequence[int]) -> None:
    rng = np.random.default_rng(heads)
    chain, left_at = (rng.dirichlet(np.ones(heads), heads), rng.dirichlet(np.ones(heads))), left_at[:heads]
    figure = plots.head_graph(*chain, {0}, "block 0", key=key, left_at=left_at)
    assert_texts_apart(figure)
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert all(str(step) in label.split("\n")[-1] for step, label in zip(left_at, labels, strict=False))


def test_axes_are_named(tiny: Report) -> None:
    heat, bar = plots.head_importance(tiny).axes
    assert (heat.get_xlabel(), heat.get_ylabel(), bar.get_ylabel()) == (
        "head",
        "block",
        "importance score (no unit)",
    )
    widths = plots.kept_widths(tiny)
    assert widths.get_supxlabel() == "kept share of the dense width (%)"
    assert [axes.get_title().split("\n")[0] for axes in widths.axes] == list(plots.KINDS.values())
    names = {(axes.get_xlabel(), axes.get_ylabel()) for axes in plots.training(tiny).axes}
    assert ("epochs trained", "top-1 accuracy (%)") in names
    assert ("epochs trained", "loss (nats)") in names
    assert ("epoch of the ADMM stage", "relative residual") in names


def test_heat_map_marks_exactly_the_removed_heads(tiny: Report, large: Report) -> None:
    for report in (tiny, large, parse(without(TINY, "blocks.3.attn"))):
        (marks,) = plots.head_importance(report).axes[0].get_lines()
        crossed = {(int(y), int(x)) for x, y in zip(*marks.get_data(), strict=True)}
        kept = [report.plan.kept[name].heads for name in report.ranking.scores]
        heads = len(report.ranking.scores["blocks.0.attn"])
        assert crossed == {(b, h) for b in range(len(kept)) for h in range(heads) if h not in kept[b]}
        assert crossed


def test_heat_map_colours_and_numbers_are_the_scores(tiny: Report, large: Report) -> None:
    for report in (tiny, large):
        axes = plots.head_importance(report).axes[0]
        drawn = np.asarray(axes.collections[0].get_array())
        np.testing.assert_array_equal(drawn, list(report.ranking.scores.values()))
    written = {text.get_text() for text in plots.head_importance(tiny).axes[0].texts}
    assert written == {f"{score:.3f}" for row in tiny.ranking.scores.values() for score in row}
    assert not plots.head_importance(large).axes[0].texts


def test_heat_map_of_blocks_with_different_head_counts(small: dict[str, Any]) -> None:
    content = copy.deepcopy(small)
    name, plan = "blocks.0.attn", content["plan"]
    plan["dense"][name]["heads"], plan["pruned"][name]["heads"] = 1, 1
    plan["kept"][name] |= {key: plan["kept"][name][key][:1] for key in ("qk", "vo")} | {"heads": [0]}
    content["ranking"]["scores"][name], content["ranking"]["transition"][name] = [1.0], [[1.0]]
    content["ranking"]["left_at"][name] = [2]
    report = parse(content)
    drawn = plots.head_importance(report).axes[0].collections[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn)[0], [False, True, True])
    render_html(report)


def test_graph_draws_the_chain() -> None:
    transition = np.array([[0.0, 0.8, 0.2], [1.0, 0.0, 0.0], [0.5, 0.4, 0.1]])
    figure = plots.head_graph(transition, [0.5, 0.4, 0.1], kept={0, 1}, title="$5 & <b>")
    axes = figure.axes[0]
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    widths = sorted(arrow.get_linewidth() for arrow in arrows)
    np.testing.assert_allclose(np.array(widths) / widths[-1], [0.2, 0.4, 0.5, 0.8, 1.0])  # no self-loop, no 0
    # Node areas are the scores; a removed head is hollow and has a second marker, its cross.
    nodes = [line for line in axes.get_lines() if line.get_marker() == "o"]
    areas = np.array([node.get_markersize() ** 2 for node in nodes])
    np.testing.assert_allclose(areas / areas[0], [1.0, 0.8, 0.2])
    assert [node.get_markerfacecolor() for node in nodes] == [plots.KEPT, plots.KEPT, plots.PAPER]
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert len(crosses) == 1
    assert crosses[0].get_xydata().tolist() == nodes[2].get_xydata().tolist()
    assert transition[2, 2] == 0.1  # the caller's matrix is not touched


def test_graph_of_many_heads_draws_the_strongest_edges() -> None:
    rng = np.random.default_rng(0)
    figure = plots.head_graph(rng.dirichlet(np.ones(16), 16), np.full(16, 1 / 16))
    arrows = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == 16 * plots.STRONGEST_EDGES
    assert not [line for line in figure.axes[0].get_lines() if line.get_marker() == "x"]


def test_graph_saves_as_png(tmp_path: Path) -> None:
    not_mathematics = r"$\frac{$"
    figure = plots.head_graph([[0.0, 1.0], [1.0, 0.0]], [0.5, 0.5], title=not_mathematics)
    figure.savefig(tmp_path / "graph.png", dpi=100)
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")


def test_graph_rejects_a_matrix_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2\), 3 scores"):
        plots.head_graph(np.eye(2), [0.2, 0.3, 0.5])


def test_bars_are_the_kept_shares(tiny: Report) -> None:
    for axes, kind in zip(plots.kept_widths(tiny).axes, plots.KINDS, strict=True):
        whole, kept = axes.containers
        assert all(bar.get_width() == 1 for bar in whole)
        pruned = [getattr(of, kind) for of in tiny.plan.pruned.values() if hasattr(of, kind)]
        dense = [getattr(of, kind) for of in tiny.plan.dense.values() if hasattr(of, kind)]
        assert [bar.get_width() for bar in kept] == [
            after / before for after, before in zip(pruned, dense, strict=True)
        ]
        assert [text.get_text() for text in axes.texts] == [str(after) for after in pruned]


def test_bars_tell_removed_sublayers_from_lacking_ones() -> None:
    figure = plots.kept_widths(parse(irregular()))
    crossed = [list(axes.get_lines()[0].get_ydata()) for axes in figure.axes]
    assert crossed == [[2], [2], [2], [4]]
    barred = [[round(bar.get_y() + bar.get_height() / 2) for bar in axes.containers[0]] for axes in figure.axes]
    assert barred == [[0, 2, 3, 4, 6, 7]] * 3 + [[0, 1, 2, 3, 4, 5, 7]]
    assert figure.axes[3].get_title() == "FFN units\nof 768–1024"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["removed sub-layer"]


def test_training_curves_stand_one_after_the_other(tiny: Report) -> None:
    residuals, top1, loss, penalty = plots.training(tiny).axes
    curves = {str(line.get_label()): line for line in top1.get_lines()}
    at = {name: list(line.get_xdata()) for name, line in curves.items()}
    assert at == {
        "dense": [1, 2, 3, 4, 5],
        "ADMM": [6],
        "pruned, fine-tuned": [7, 8],
        "dense, trained longer": [6, 7, 8],
    }
    expected = [epoch.top1 for epoch in tiny.curves.finetune]
    assert list(curves["pruned, fine-tuned"].get_ydata()) == expected
    assert len(loss.get_lines()) == 8  # training and validation loss of four stages
    assert residuals.get_yscale() == penalty.get_yscale() == "log"
    primal, dual = (line.get_ydata() for line in residuals.get_lines())
    assert tiny.admm
    trace = tiny.admm.trace
    assert list(primal) == [step.primal for step in trace]
    assert np.isnan(dual[0])  # the first dual residual is 0: a gap, not a plunge
    assert list(penalty.get_lines()[0].get_ydata()) == [step.rho for step in trace]


def test_unscored_epochs_are_left_out() -> None:
    content = copy.deepcopy(TINY)
    content["curves"]["dense"][1] |= {"top1": None, "loss": None}
    assert list(plots.training(parse(content)).axes[1].get_lines()[0].get_xdata()) == [1, 3, 4, 5]


def test_training_without_training_is_an_error() -> None:
    with pytest.raises(RunError, match="no training"):
        plots.training(parse(one_shot(TINY)))
