"""The report: schema, both files, the page and its pictures, on synthetic reports of two model sizes."""

from __future__ import annotations

import copy
import json
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text

from gohsp.errors import RunError, StorageError
from gohsp.report import HEADERS, plots, read, render_html, summary_table, validate, write
from gohsp.report.html import duration, index_ranges, quantity, signed

SCRIPT = "<script>alert('x')</script>"


def make_report(blocks: int = 12, heads: int = 3, ffn: int = 768, seed: int = 0) -> dict[str, Any]:
    """A plausible train-route report of a ViT with `blocks` blocks of `heads` heads of 64 dimensions."""
    rng = np.random.default_rng(seed)
    dense = {"heads": heads, "qk": 64, "vo": 64, "ffn": ffn}
    pruned, kept, scores, transition = [], [], [], []
    for block in range(blocks):
        edges = rng.uniform(0.1, 0.69, (heads, heads))
        edges = edges + edges.T
        np.fill_diagonal(edges, 0)
        matrix = edges / edges.sum(1, keepdims=True) if heads > 1 else np.ones((1, 1))
        score = rng.dirichlet(np.full(heads, 6.0))
        stay = max(1, heads - int(rng.integers(0, heads // 2 + 1)))
        widths = {
            "heads": stay,
            "qk": int(rng.choice([16, 24, 32])),
            "vo": int(rng.choice([32, 48, 64])),
            "ffn": ffn - 64 * int(rng.integers(1, ffn // 80)) if block > 0 else ffn,
        }

        def pick(total: int, count: int) -> list[int]:
            return sorted(int(i) for i in rng.choice(total, count, replace=False))

        pruned.append(widths)
        kept.append(
            {
                "heads": sorted(int(h) for h in np.argsort(score)[::-1][:stay]),
                "qk": [pick(64, widths["qk"]) for _ in range(stay)],
                "vo": [pick(64, widths["vo"]) for _ in range(stay)],
                "ffn": pick(ffn, widths["ffn"]),
            }
        )
        scores.append(score.tolist())
        transition.append(matrix.tolist())

    def curve(epochs: int, first: float, last: float) -> list[dict[str, Any]]:
        top1 = last + (first - last) * np.exp(-1.5 * np.arange(epochs))
        return [
            {
                "epoch": i + 1,
                "train_loss": float(2.4 - value / 50),
                "top1": float(value),
                "loss": float(2.2 - value / 50),
                "learning_rate": 1e-4 * (1 - i / epochs),
                "seconds": 61.5,
            }
            for i, value in enumerate(top1)
        ]

    steps = 24
    return {
        "schema_version": 3,
        "gohsp": "0.1.0",
        "created": "2025-11-22T17:30:00+00:00",
        "command": ["gohsp", "prune", "recipes/deit tiny.toml", "--budget", "params=-40%"],
        "seed": 0,
        "machine": {"device": "cpu", "processor": "Example CPU 9000", "cores": 2, "python": "3.11.7"},
        "versions": {"torch": "2.8.0", "timm": "1.0.31"},
        "model": {
            "library": "timm",
            "architecture": "deit_tiny_patch16_224",
            "arguments": {"num_classes": 10, "img_size": 112},
        },
        "data": {
            "source": "hfds/imagewoof-160",
            "train_split": "train",
            "validation_split": "validation",
            "image_size": 112,
            "classes": 10,
            "calibration_images": 1024,
            "train_images": 5000,
            "validation_images": 2000,
            "unreadable_images": 0,
        },
        "budget": {"kind": "params", "requested": "params=-40%", "limit": 3_316_000, "achieved": 3_315_000},
        "dense": {
            "params": 5_525_000,
            "macs": 320_000_000,
            "top1": 83.8,
            "top5": 98.5,
            "loss": 0.52,
            "n": 2000,
        },
        "dense_retrained": {
            "params": 5_525_000,
            "macs": 320_000_000,
            "top1": 84.25,
            "top5": 98.6,
            "loss": 0.50,
            "n": 2000,
        },
        "pruned": {
            "params": 3_315_000,
            "macs": 176_000_000,
            "top1": 81.7,
            "top5": 98.0,
            "loss": 0.61,
            "n": 2000,
        },
        "fidelity": {"images": 128, "kl": 0.321, "predicted_kl": 0.25, "agreement": 79.6},
        "plan": {"dense": [dict(dense) for _ in range(blocks)], "pruned": pruned, "kept": kept},
        "ranking": {
            "method": "chain",
            "edge": "jsd",
            "scope": "layer",
            "damping": 0.3,
            "teleport": "contribution",
            "scores": scores,
            "transition": transition,
            "iterations": 17,
            "residual": 3.1e-11,
            "images": 1000,
            "notes": [],
        },
        "admm": {
            "status": "converged",
            "metric": "data",
            "penalty": "decoupled",
            "trace": [
                {
                    "step": i,
                    "epoch": (i + 1) / steps,
                    "rho": float(0.004 * 50 ** (i / (steps - 1))),
                    "primal": float(0.6 * np.exp(-i / 6)),
                    "dual": float(0.2 * np.exp(-i / 9)) if i else 0.0,
                    "flips": max(0, 40 - 2 * i),
                }
                for i in range(steps)
            ],
            "loss_before_cut": 0.5712,
            "loss_after_cut": 0.5934,
        },
        "equality": {"max_relative_difference": 3e-7, "tolerance": 1e-5, "images": 8},
        "curves": {
            "dense": curve(5, 55.0, 83.8),
            "admm": curve(1, 76.9, 76.9),
            "finetune": curve(2, 80.1, 81.7),
            "dense_retrained": curve(3, 83.9, 84.25),
        },
        "timings": {"train dense": 1850.0, "rank": 34.2, "allocate": 210.0, "admm": 410.0, "finetune": 805.5},
        "recipe": {"seed": 0, "budget": "params=-40%", "train": {"epochs": 3, "optimizer": "adamw"}},
    }


def one_shot(report: dict[str, Any]) -> dict[str, Any]:
    """The same run without any training."""
    report = {key: value for key, value in report.items() if key not in ("admm", "dense_retrained")}
    return report | {"curves": {}}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return make_report()


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """Two blocks, where rendering should not cost time."""
    return make_report(2)


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    return make_report(24, 16, 4096, seed=1)


# --- schema ---------------------------------------------------------------------------------------------


def edited(report: dict[str, Any], path: str, value: Any = None, *, drop: bool = False) -> dict[str, Any]:
    """A deep copy with the entry at a dotted path set, or dropped."""
    report = copy.deepcopy(report)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    level: Any = report
    for part in parents:
        level = level[part]
    if drop:
        del level[last]
    else:
        level[last] = value
    return report


def test_valid_reports_pass(tiny: dict[str, Any], large: dict[str, Any]) -> None:
    for report in (tiny, large, one_shot(tiny)):
        validate(report)
        validate(json.loads(json.dumps(report)))


@pytest.mark.parametrize(
    "path",
    [
        "schema_version",
        "budget",
        "pruned.top1",
        "plan.kept",
        "plan.pruned.3.ffn",
        "ranking.transition",
        "admm.trace.2.rho",
        "admm.loss_after_cut",
        "curves.finetune.0.loss",
        "equality.tolerance",
        "data.classes",
    ],
)
def test_missing_key_is_named(tiny: dict[str, Any], path: str) -> None:
    with pytest.raises(RunError, match=rf"\b{path.split('.')[-1]}\b"):
        validate(edited(tiny, path, drop=True))


@pytest.mark.parametrize(
    ("path", "misspelt", "meant"),
    [
        ("equalitty", "equalitty", "equality"),
        ("pruned.top_1", "top_1", "top1"),
        ("plan.dense.0.fnn", "fnn", "ffn"),
        ("curves.fine_tune", "fine_tune", "finetune"),
        ("ranking.dampening", "dampening", "damping"),
    ],
)
def test_misspelt_key_is_named_with_the_right_one(tiny: dict[str, Any], path: str, misspelt: str, meant: str) -> None:
    with pytest.raises(RunError, match=rf"unknown key '{misspelt}', did you mean '{meant}'"):
        validate(edited(tiny, path, 1))


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        ("pruned.params", "3.3M", r"'pruned\.params'.*'3\.3M'"),
        ("pruned.params", 3.5, r"'pruned\.params'.*3\.5"),
        ("pruned.top1", 101.0, r"'pruned\.top1'.*101"),
        ("pruned.loss", float("nan"), r"'pruned\.loss'"),
        ("recipe.train.lr", float("inf"), r"'recipe\.train.*inf"),
        ("recipe.train.lr", {1: 2}, r"'recipe\.train.*valid string"),
        ("model.arguments.act", print, r"'model\.arguments\.act'.*JSON"),
        ("budget.kind", "flops", r"'budget\.kind'.*'flops'"),
        ("created", "2025-11-22T17:30:00", r"'created'.*UTC"),
        ("created", "2025-11-22T17:30:00+02:00", r"'created'.*UTC"),
        ("created", "yesterday", r"'created'.*yesterday"),
        ("admm.trace.4.primal", -1.0, r"'admm\.trace\[4\]\.primal'.*-1"),
        ("plan.kept.1.heads", [0, 0], r"kept\[1\]\.heads must be strictly increasing"),
        ("plan.kept.2.heads", [0, 1, 3], r"kept\[2\]\.heads names index 3, the dense width is 3"),
        ("plan.pruned.5.ffn", 8, r"kept\[5\]\.ffn has \d+ indices, the pruned width is 8"),
        ("plan.kept.0.qk", [], r"kept\[0\]\.qk has 0 lists for 2 kept heads"),
        ("plan.pruned", [], r"dense has 12 blocks, pruned 0 and kept 12"),
        ("ranking.transition.6", [[1.0]], r"transition\[6\] is not 3 x 3"),
        ("ranking.transition.6.1", [0.5, 0.0, 0.4], r"transition\[6\]\[1\] sums to 0\.9, must be 1"),
        ("ranking.scores", [[1.0]], r"transition has 12 blocks, scores 1"),
    ],
)
def test_wrong_value_is_named(tiny: dict[str, Any], path: str, value: Any, names: str) -> None:
    with pytest.raises(RunError, match=names):
        validate(edited(tiny, path, value))


def test_scores_must_cover_the_plans_heads(tiny: dict[str, Any]) -> None:
    report = edited(tiny, "ranking.scores.0", [0.5, 0.5])
    report["ranking"]["transition"][0] = [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(RunError, match=r"ranking\.scores has \[2, 3.*plan\.dense has \[3, 3"):
        validate(report)


def test_global_chain_may_leave_its_block(tiny: dict[str, Any]) -> None:
    row = [0.0, 0.1, 0.05]
    validate(edited(edited(tiny, "ranking.transition.6.0", row), "ranking.scope", "global"))
    with pytest.raises(RunError, match="at most 1"):
        validate(edited(edited(tiny, "ranking.transition.6.0", [0.0, 0.9, 0.9]), "ranking.scope", "global"))


def test_reports_of_version_1_are_read(small: dict[str, Any]) -> None:
    old = copy.deepcopy(small) | {"schema_version": 1}
    del old["fidelity"], old["data"]["calibration_images"]
    validate(old)
    assert "Right after the cut" not in Page(render_html(old)).text


def test_other_schema_version_says_so(tiny: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"schema_version 4, this gohsp knows \(1, 2, 3\)"):
        validate(edited(tiny, "schema_version", 4))


def test_not_an_object() -> None:
    with pytest.raises(RunError, match="got list"):
        validate([])  # type: ignore[arg-type]


# --- files ----------------------------------------------------------------------------------------------


def test_write_then_read_is_identity(small: dict[str, Any], tmp_path: Path) -> None:
    write(small, tmp_path / "run")
    assert read(tmp_path / "run") == small
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "run" / "report.json").read_text().startswith('{\n  "schema_version": 3,')
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == render_html(small)


def test_invalid_report_writes_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError):
        write(edited(small, "pruned.top1", drop=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_failing_write_leaves_the_old_files(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    write(one_shot(small), tmp_path)
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
        write(small, tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_files_are_readable_by_others_as_the_umask_says(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(one_shot(small), tmp_path)
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


def test_a_report_that_was_changed_is_refused_however_plausible(small: dict[str, Any], tmp_path: Path) -> None:
    write(small, tmp_path)
    path = tmp_path / "report.json"
    whole = path.read_text()
    assert whole.count("83.8") == 1
    path.write_text(whole.replace("83.8", "93.8"))
    with pytest.raises(RunError, match=r"report\.json' is not as it was written"):
        read(tmp_path)
    path.write_text(json.dumps(json.loads(whole)))  # laid out otherwise
    assert read(tmp_path) == small


@pytest.mark.parametrize("version", [1, 2])
def test_reports_without_a_digest_are_read(small: dict[str, Any], tmp_path: Path, version: int) -> None:
    old = copy.deepcopy(small) | {"schema_version": version}
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert read(tmp_path) == old


# --- the table ------------------------------------------------------------------------------------------


def test_summary_numbers(tiny: dict[str, Any]) -> None:
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
    assert len(pruned.cells()) == len(HEADERS)
    assert pruned.cells() == [
        ("pruned", ""),
        ("3.31 M", "−40.0 %"),
        ("176 M", "−45.0 %"),
        ("81.7 ± 0.9", "−2.1"),
        ("98.0", "−0.5"),
        ("0.610", "+0.090"),
    ]


def test_summary_without_retrained(tiny: dict[str, Any]) -> None:
    assert [row.model for row in summary_table(one_shot(tiny))] == ["dense", "pruned"]


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
    assert [duration(s) for s in (0.44, 34.2, 185, 3599.7, 7800)] == [
        "0.4 s",
        "34 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 10 min",
    ]
    assert [index_ranges(i) for i in ([], [3], [0, 1, 2, 5], [0, 2, 3])] == ["none", "3", "0–2, 5", "0, 2–3"]


# --- the page -------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What the tests ask of a page: its tags with attributes, its ids and text, and that tags balance."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def labels(self) -> list[str | None]:
        return [attributes["aria-label"] for tag, attributes in self.tags if tag == "svg"]


@pytest.fixture(scope="module")
def html(tiny: dict[str, Any]) -> str:
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
    assert "gohsp prune 'recipes/deit tiny.toml' --budget params=-40%" in page.text
    kept, total = 0, 36
    for block in make_report()["plan"]["kept"]:
        kept += len(block["heads"])
    assert f"{kept} of {total}" in page.text


def test_page_of_a_run_without_training(small: dict[str, Any]) -> None:
    page = Page(render_html(one_shot(small)))
    assert "The course of training over the epochs" not in page.labels()
    assert "ADMM" not in page.text
    assert "trained longer" not in page.text


def without_labels(report: dict[str, Any]) -> dict[str, Any]:
    """What the one-shot route writes."""
    report = copy.deepcopy(one_shot(report))
    for name in ("dense", "pruned"):
        report[name] = {key: report[name][key] for key in ("params", "macs")}
    for key in ("validation_split", "train_images", "validation_images", "unreadable_images"):
        del report["data"][key]
    return report


def test_page_without_labels_shows_agreement_instead_of_accuracy(small: dict[str, Any]) -> None:
    report = without_labels(small)
    validate(report)
    page = Page(render_html(report))
    assert "Agrees with dense" in page.text
    assert "79.6 %" in page.text
    assert "reads no labels" in page.text
    assert "Top-1 accuracy" not in page.text
    assert summary_table(report)[1].cells()[3] == ("–", "")


def test_scores_are_complete_or_absent(small: dict[str, Any]) -> None:
    report = without_labels(small)
    report["pruned"]["top1"] = 50.0
    with pytest.raises(RunError, match="all of top1, top5, loss and n"):
        validate(report)


def test_fidelity_is_told(page: Page) -> None:
    assert "0.321 nats (0.250 predicted)" in page.text


@pytest.mark.parametrize(
    ("kept", "told"), [(1, "kept as it was after 1 of 2 windows"), (0, "No window of the polish helped")]
)
def test_the_polish_is_told(small: dict[str, Any], kept: int, told: str) -> None:
    curve = [{"blocks": n, "error": None if n == 0 else 0.9, "kl": kl} for n, kl in enumerate((0.4, 0.321, 0.5))]
    content = small | {"polish": {"kept": kept, "curve": curve}}
    validate(content)
    text = Page(render_html(content)).text
    assert told in text
    assert "After the cut and its polish" in text
    with pytest.raises(RunError, match="kept names 3 blocks"):
        validate(content | {"polish": {"kept": 3, "curve": curve}})


def test_page_with_curves_but_no_admm(small: dict[str, Any]) -> None:
    report = {key: value for key, value in small.items() if key != "admm"}
    page = Page(render_html(report | {"curves": {"finetune": small["curves"]["finetune"]}}))
    assert "The course of training over the epochs" in page.labels()


def test_large_model_renders(large: dict[str, Any]) -> None:
    html = render_html(large)
    assert len(Page(html).labels()) == 3 + 24
    assert len(html) < 4_000_000


def test_untrusted_text_is_escaped(small: dict[str, Any]) -> None:
    report = copy.deepcopy(small)
    report["model"]["architecture"] = report["data"]["source"] = report["machine"]["processor"] = SCRIPT
    report["ranking"]["edge"] = report["ranking"]["method"] = report["admm"]["status"] = SCRIPT
    report["ranking"]["notes"] = ["<img src=x onerror=alert(1)>"]
    report["command"] = ["gohsp", "</pre>" + SCRIPT]
    report["recipe"] = report["model"]["arguments"] = {SCRIPT: {"x": [SCRIPT, "</pre>", "$\\frac{"]}}
    report["versions"] = report["versions"] | {"items": SCRIPT}
    report["timings"] = {SCRIPT: 1.0, "values": 2.0}
    page = Page(render_html(report))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.text.count("alert('x')") >= 8


def test_class_names_are_shown_shortened_and_escaped(small: dict[str, Any]) -> None:
    names = [SCRIPT, *(f"class {number}" for number in range(1, small["data"]["classes"]))]
    report = edited(small, "data.class_names", names)
    validate(report)
    page = Page(render_html(report))
    assert SCRIPT + ", class 1, " in page.text
    assert not [tag for tag, _ in page.tags if tag == "script"]
    many = edited(edited(small, "data.classes", 1000), "data.class_names", [f"c{number}" for number in range(1000)])
    text = Page(render_html(many)).text
    assert "c18, c19 and 980 more" in text
    assert "c20" not in text
    with pytest.raises(RunError, match=r"data.*class_names has 3 names for 10 classes"):
        validate(edited(small, "data.class_names", ["a", "b", "c"]))


def test_warnings_are_shown_where_due(small: dict[str, Any], page: Page) -> None:
    assert not any(attributes.get("class") == "warn" for _, attributes in page.tags)
    report = edited(small, "admm.status", "epochs_over")
    report["data"]["unreadable_images"] = 7
    report["ranking"]["notes"] = ["block 3 is reducible"]
    report["budget"]["achieved"] = 4_000_000
    report["equality"]["max_relative_difference"] = 0.1
    text = Page(render_html(report)).text
    for part in (
        "did not converge; it ended with status “epochs_over”",
        "7 images could not be read",
        "block 3 is reducible",
        "budget is not met",
    ):
        assert part in text
    assert "does not compute what the masked dense model computes" in text
    assert "exceeded by 20.63 %" in text


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
    report = make_report(blocks, heads, ffn, seed=2)
    for draw in (plots.head_importance, plots.kept_widths, plots.training):
        assert_texts_apart(draw(report))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 9, 12, 16, 24])
@pytest.mark.parametrize("key", [True, False])
def test_graph_labels_do_not_overlap(heads: int, key: bool) -> None:
    rng = np.random.default_rng(heads)
    figure = plots.head_graph(
        rng.dirichlet(np.ones(heads), heads), rng.dirichlet(np.ones(heads)), {0}, "block 0", key=key
    )
    assert_texts_apart(figure)


def test_axes_are_named(tiny: dict[str, Any]) -> None:
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


def test_heat_map_marks_exactly_the_removed_heads(tiny: dict[str, Any], large: dict[str, Any]) -> None:
    for report in (tiny, large):
        (marks,) = plots.head_importance(report).axes[0].get_lines()
        crossed = {(int(y), int(x)) for x, y in zip(*marks.get_data(), strict=True)}
        kept = [set(block["heads"]) for block in report["plan"]["kept"]]
        heads = len(report["ranking"]["scores"][0])
        assert crossed == {(b, h) for b in range(len(kept)) for h in range(heads) if h not in kept[b]}
        assert crossed


def test_heat_map_colours_and_numbers_are_the_scores(tiny: dict[str, Any], large: dict[str, Any]) -> None:
    for report in (tiny, large):
        axes = plots.head_importance(report).axes[0]
        drawn = np.asarray(axes.collections[0].get_array())
        np.testing.assert_array_equal(drawn, report["ranking"]["scores"])
    written = {text.get_text() for text in plots.head_importance(tiny).axes[0].texts}
    assert written == {f"{score:.3f}" for row in tiny["ranking"]["scores"] for score in row}
    assert not plots.head_importance(large).axes[0].texts


def test_heat_map_of_blocks_with_different_head_counts(small: dict[str, Any]) -> None:
    report = copy.deepcopy(small)
    report["plan"]["dense"][0]["heads"], report["plan"]["pruned"][0]["heads"] = 1, 1
    report["plan"]["kept"][0] |= {key: report["plan"]["kept"][0][key][:1] for key in ("qk", "vo")} | {"heads": [0]}
    report["ranking"]["scores"][0], report["ranking"]["transition"][0] = [1.0], [[1.0]]
    validate(report)
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
    assert [node.get_markerfacecolor() for node in nodes] == [plots.KEPT, plots.KEPT, "white"]
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


def test_bars_are_the_kept_shares(tiny: dict[str, Any]) -> None:
    for axes, kind in zip(plots.kept_widths(tiny).axes, plots.KINDS, strict=True):
        whole, kept = axes.containers
        assert all(bar.get_width() == 1 for bar in whole)
        pairs = zip(tiny["plan"]["pruned"], tiny["plan"]["dense"], strict=True)
        assert [bar.get_width() for bar in kept] == [after[kind] / before[kind] for after, before in pairs]
        assert [text.get_text() for text in axes.texts] == [str(b[kind]) for b in tiny["plan"]["pruned"]]


def test_training_curves_stand_one_after_the_other(tiny: dict[str, Any]) -> None:
    residuals, top1, loss, penalty = plots.training(tiny).axes
    curves = {str(line.get_label()): line for line in top1.get_lines()}
    at = {name: list(line.get_xdata()) for name, line in curves.items()}
    assert at == {
        "dense": [1, 2, 3, 4, 5],
        "ADMM": [6],
        "pruned, fine-tuned": [7, 8],
        "dense, trained longer": [6, 7, 8],
    }
    expected = [epoch["top1"] for epoch in tiny["curves"]["finetune"]]
    assert list(curves["pruned, fine-tuned"].get_ydata()) == expected
    assert len(loss.get_lines()) == 8  # training and validation loss of four stages
    assert residuals.get_yscale() == penalty.get_yscale() == "log"
    primal, dual = (line.get_ydata() for line in residuals.get_lines())
    trace = tiny["admm"]["trace"]
    assert list(primal) == [step["primal"] for step in trace]
    assert np.isnan(dual[0])  # the first dual residual is 0: a gap, not a plunge
    assert list(penalty.get_lines()[0].get_ydata()) == [step["rho"] for step in trace]


def test_unscored_epochs_are_left_out(tiny: dict[str, Any]) -> None:
    report = copy.deepcopy(tiny)
    report["curves"]["dense"][1] |= {"top1": None, "loss": None}
    validate(report)
    assert list(plots.training(report).axes[1].get_lines()[0].get_xdata()) == [1, 3, 4, 5]


def test_training_without_training_is_an_error(tiny: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="no training"):
        plots.training(one_shot(tiny))
