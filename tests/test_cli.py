"""The command line in-process: what each verb prints and writes, and how it fails."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import gohsp
from gohsp import cli, config, console, report
from gohsp.config import Config
from gohsp.errors import CheckpointError, GohspError
from gohsp.structure import AttentionWidths, FfnWidths

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}

SETTINGS = """
method = "finetune"
compare_dense = false
precision = "no"
uniform = true
[calibration]
images = 48
[widths]
multiple = 2
min_width = 2
[finetune]
epochs = 1
[training]
batch_size = 48
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    gohsp.save(timm.create_model("vit_tiny_patch16_224", **SMALL), folder)
    return str(folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("settings") / "settings.toml"
    path.write_text(SETTINGS)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: str, settings: str) -> Path:
    """A finished run without training: --finetune.epochs 0 goes before the file's 1."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["prune", model, "--data", "digits", "--budget", "params=-30%", "--out", str(out)]
    status = cli.main([*arguments, "--config", settings, "--finetune.epochs", "0", "--heal.learning-rate", "0.5"])
    assert status == 0
    return out


# prune


def test_flags_go_before_the_file_and_the_file_before_the_defaults(run: Path):
    written = config.read(run / "settings.toml")
    assert (written.finetune.epochs, written.heal.learning_rate) == (0, 0.5)
    assert (written.training.batch_size, written.uniform, written.compare_dense) == (48, True, False)
    assert written.training.optimizer == Config().training.optimizer
    assert sorted(file.name for file in (run / "plain").iterdir()) == ["config.json", "model.safetensors"]
    content = json.loads((run / "report.json").read_text())
    assert content["command"][:2] == ["gohsp", "prune"]
    assert "--finetune.epochs" in content["command"]
    assert content["curves"]["finetune"] == []


def test_an_edited_plan_is_taken(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = {"blocks.0.attn": {"heads": 2, "qk": 8, "vo": 4}, "blocks.0.mlp": {"units": 10}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    given: dict[str, Any] = {}

    def run(*_: Any, **options: Any) -> Any:
        given.update(options)
        raise GohspError("enough")

    monkeypatch.setattr("gohsp.runs.run", run)
    arguments = ["prune", model, "--data", "digits", "--budget", "params=-30%", "--out", str(tmp_path / "run")]
    more = ["--exclude", "blocks.1", "qk", "--method", "finetune"]
    assert cli.main([*arguments, "--plan", str(tmp_path / "plan.json"), "--resume", *more]) == 1
    assert given["widths"] == {
        "blocks.0.attn": AttentionWidths(heads=2, qk=8, vo=4),
        "blocks.0.mlp": FfnWidths(units=10),
    }
    assert list(given["exclude"]) == ["blocks.1", "qk"]
    assert given["config"].method == "finetune"
    assert (given["resume"], given["overwrite"]) == (True, False)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "{}", '{"blocks.0.attn": {"heads": 1}}', '{"blocks.0.attn": {"heads": 0, "qk": 1, "vo": 1}}'],
)
def test_a_plan_that_cannot_be_read_is_refused(
    model: str, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "plan.json").write_text(text)
    arguments = ["prune", model, "--data", "digits", "--budget", "params=-30%", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--plan", str(tmp_path / "plan.json")]) == 1
    assert "plan" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# rank


def test_rank_prints_the_table_and_writes_the_ranking_and_its_graph(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "ranking"
    arguments = ["rank", model, "--data", "digits", "--images", "16", "--attention", "blocks.1.attn", "--out", str(out)]
    assert cli.main([*arguments, "--method", "random"]) == 0
    record = json.loads((out / "ranking.json").read_text())
    assert record["method"] == "random"
    assert {name: len(scores) for name, scores in record["scores"].items()} == {"blocks.0.attn": 4, "blocks.1.attn": 4}
    assert (out / "graph.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    scores = record["scores"]["blocks.1.attn"]
    best = max(range(4), key=lambda h: scores[h])
    row = next(line for line in printed.splitlines() if line.strip(" │┃|").startswith("blocks.1.attn "))
    assert f"{best} ({scores[best]:.4f})" in row
    assert row.index(f"{best} (") == min(row.index(f"{h} (") for h in range(4))


def test_rank_refuses_an_attention_that_is_not_there(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        cli.main(["rank", model, "--data", "digits", "--attention", "blocks.2.attn", "--out", str(tmp_path / "r")]) == 1
    )
    assert "must be one of ['blocks.0.attn', 'blocks.1.attn'], got 'blocks.2.attn'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# evaluate


def test_evaluate_prints_exactly_one_line_of_json(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["evaluate", str(run), "--data", "digits", "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\n")
    (line,) = printed.splitlines()
    scores = json.loads(line)
    assert list(scores) == ["top1", "top5", "loss", "n"]
    reported = json.loads((run / "report.json").read_text())["pruned"]
    assert {k: scores[k] for k in ("top1", "top5", "n")} == {k: reported[k] for k in ("top1", "top5", "n")}


def test_evaluate_for_people_names_the_unreadable_images(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from PIL import Image

    for name in "0123456789":
        (tmp_path / "images" / "test" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * int(name)).save(tmp_path / "images" / "test" / name / "a.png")
    (tmp_path / "images" / "test" / "3" / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    arguments = ["evaluate", model, "--data", str(tmp_path / "images"), "--split", "test"]
    assert cli.main([*arguments, "--batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "1 images could not be read" in printed
    assert "n 10" in printed
    assert cli.main([*arguments, "--strict"]) == 1
    assert "b.jpg" in capsys.readouterr().err


# report


def test_report_renders_again(run: Path, capsys: pytest.CaptureFixture[str]):
    page = (run / "report.html").read_bytes()
    (run / "report.html").write_text("spoilt")
    assert cli.main(["report", str(run)]) == 0
    assert len((run / "report.html").read_bytes()) == len(page)
    printed = capsys.readouterr().out
    assert "params=-30%" in printed
    assert "report.html" in printed


# The hub


def test_the_card_of_a_run_tells_what_was_before_and_the_report_of_another_model_is_refused(
    run: Path, model: str, tmp_path: Path
):
    card = gohsp.model_card(run, "me/small")
    content = report.read(run)
    assert (
        f"| parameters | {report.quantity(content.dense.params)} | {report.quantity(content.pruned.params)} (" in card
    )
    assert "| blocks.0.mlp | units 128 | units " in card
    shutil.copytree(run, tmp_path / "run")
    gohsp.save(gohsp.load(model), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"report\.json' is the report of a model with other widths"):
        gohsp.model_card(tmp_path / "run", "me/small")


# Progress


def test_where_no_bar_can_be_drawn_lines_say_how_far_a_step_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = iter([0.0, 100.0, 129.0, 130.0, 131.0, 190.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress() as tell:
        for done in range(5):
            tell(gohsp.Progress("heal", done, 4))
    lines = ["heal: begins, 4 to do", "heal: 2 of 4 after 0:30", "heal: 4 of 4 after 1:30"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_warning_in_a_log_file_is_a_line_however_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    cli._set_up()
    logging.getLogger("gohsp").info("not for a log file")
    logging.getLogger("gohsp").warning("%s images are too few", "many " * 50)
    assert capsys.readouterr().err == f"WARNING {'many ' * 50} images are too few\n"


# Failing


def test_a_misspelt_flag_is_misuse_with_a_suggestion(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["prune", model, "--data", "digits", "--budget", "params=-30%", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as misuse:
        cli.main([*arguments, "--finetune.epoch", "1"])
    assert misuse.value.code == 2
    captured = capsys.readouterr()
    assert "--finetune.epochs" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["prun"], [], ["evaluate", "m", "--data", "d", "--batch-size", "many"]])
def test_misuse_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as misuse:
        cli.main(arguments)
    assert misuse.value.code == 2
    assert capsys.readouterr().out == ""


def test_help_says_what_it_is_for(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "Vision Transformers smaller and faster" in capsys.readouterr().out


def test_a_misspelt_key_of_the_settings_is_refused_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "typo.toml").write_text("[training]\nbatchsize = 3\n")
    arguments = ["prune", "m", "--data", "digits", "--budget", "params=-30%", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--config", str(tmp_path / "typo.toml")]) == 1
    captured = capsys.readouterr()
    assert "unknown key 'training.batchsize'; did you mean 'batch_size'?" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "no-such-model", "--data", "digits"],
        ["evaluate", "MODEL", "--data", "digits", "--split", "tset"],
        ["prune", "MODEL", "--data", "digits", "--budget", "speed=-10%", "--out", "OUT"],
        ["report", "OUT"],
    ],
)
def test_what_is_refused_exits_with_one_and_is_said_on_stderr(
    model: str, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    places = {"MODEL": model, "OUT": str(tmp_path / "none")}
    assert cli.main([places.get(a, a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.out == ""


@pytest.mark.parametrize("text", ["'w' is [1, 2], the model has [3]", "valid: ['a', 'b']", "see [/red] and [bold]x"])
def test_brackets_in_messages_are_shown(
    model: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: Any, **__: Any) -> Any:
        raise GohspError(text)

    monkeypatch.setattr(cli, "evaluate", fail)
    assert cli.main(["evaluate", model, "--data", "digits", "--json"]) == 1
    assert capsys.readouterr().err == f"error: {text}\n"


def test_brackets_in_paths_are_shown(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "[red]"
    assert cli.main(["rank", model, "--data", "digits", "--images", "8", "--method", "random", "--out", str(out)]) == 0
    assert "[red]" in capsys.readouterr().out.replace("\n", "")


def test_an_interruption_exits_with_130(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "evaluate", interrupt)
    assert cli.main(["evaluate", model, "--data", "digits"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_oneshot_is_the_default_method(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    arguments = ["prune", model, "--data", "digits", "--budget", "params=-30%", "--out", str(out)]
    widths = ["--widths.multiple", "2", "--widths.min-width", "2"]
    assert cli.main([*arguments, "--calibration.images", "40", *widths]) == 0
    content = report.read(out)
    dense = f"{content.dense.params:,} parameters"
    first, second, *_ = capsys.readouterr().err.splitlines()  # which is no terminal's
    assert first == f"budget params=-30%: at most {int(0.7 * content.dense.params):,} of {dense}"
    assert second.startswith("images: begins, ")
    assert content.method == content.config["method"] == "oneshot"
    assert content.data.calibration_images == 40
    assert content.pruned.top1 is None
    assert cli.main(["evaluate", str(out), "--data", "digits"]) == 0
