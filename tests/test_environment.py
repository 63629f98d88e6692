"""Disks that are full, streams that take no character or are closed, odd names: one clear error, or none at all."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import gohsp
from gohsp import cli, config, report
from gohsp.structure import widths_from_json

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
FAST = ["--device", "cpu", "--calibration.images", "32", "--calibration.holdout", "8", "--latency.rounds", "1"]
PLAN = {
    f"blocks.{block}.{name}": widths
    for block in (0, 1)
    for name, widths in (("attn", {"heads": 3, "qk": 4, "vo": 6}), ("mlp", {"units": 50}))
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    gohsp.save(timm.create_model("vit_tiny_patch16_224", **SMALL), folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(prune(model, out)) == 0
    return out


def prune(model: str, out: Path | str, *more: str) -> list[str]:
    plan = Path(model).parent / "plan.json"
    plan.write_text(json.dumps(PLAN))
    arguments = ["prune", model, "--data", "digits", "--budget", "params=-20%", "--out", str(out)]
    return [*arguments, "--plan", str(plan), *FAST, *more]


def fails_with_one_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


# Folders


@pytest.mark.parametrize("odd", ["file", "file/run", "/dev/null", "/dev/null/run", "", "x" * 300, "loop", "loop/run"])
@pytest.mark.parametrize("option", ["", "--resume", "--overwrite"])
def test_an_odd_folder_is_one_error_before_any_work(
    tmp_path: Path, odd: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    # The model and the data are not even looked for.
    arguments = ["prune", "no-such-model", "--data", "no/such/folder", "--budget", "params=-20%", "--out", odd]
    error = fails_with_one_error([*arguments, *([option] if option else [])], capsys)
    assert "folder" in error
    assert odd in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("odd", ["file", "file/below", "", "x" * 300])
def test_ranking_into_an_odd_folder_is_one_error_before_any_work(
    tmp_path: Path, model: str, odd: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was done")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gohsp.steps.analyse", refuse)
    (tmp_path / "file").write_text("precious")
    error = fails_with_one_error(["rank", model, "--data", "digits", "--out", odd], capsys)
    assert odd in error
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_may_not_be_written_is_one_error(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    error = fails_with_one_error(prune(model, tmp_path / "run"), capsys)
    assert "run' cannot be used as a run's folder (Permission denied); name one that can be written" in error


@pytest.mark.parametrize("verb", ["evaluate", "report", "rank"])
def test_an_error_of_the_system_is_one_error(
    tmp_path: Path,
    model: str,
    run: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error", "some.png")

    places = {"evaluate": "gohsp.cli.evaluate", "report": "gohsp.report.write", "rank": "gohsp.steps.analyse"}
    monkeypatch.setattr(places[verb], fail)
    arguments = {"report": [str(run)]}.get(verb, [model, "--data", "digits"])
    arguments += ["--out", str(tmp_path / "ranking")] if verb == "rank" else []
    assert "Input/output error: 'some.png'" in fails_with_one_error([verb, *arguments], capsys)


# Disks


def test_a_disk_that_fills_up_is_one_error_and_the_run_goes_on_later(
    tmp_path: Path, model: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    """A limit on the size of files stands for the disk: safetensors, PyTorch and Python each meet it in their way."""
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        error = fails_with_one_error(prune(model, out), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in error
    assert error.endswith("what is finished is kept: go on with --resume")
    assert torch.is_grad_enabled()
    assert cli.main(prune(model, out, "--resume")) == 0
    for name in ("model.safetensors", "plan.json", "ranking.json"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_disk_that_fills_up_between_epochs_leaves_the_last_one(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["prune", "vit_tiny_patch16_224", "--data", "digits", "--budget", "params=-20%", "--device", "cpu"]
    settings = {"method": "gohsp", "model_arguments": {k: v for k, v in SMALL.items() if k != "num_classes"}}
    (tmp_path / "settings.toml").write_text(config.to_toml(config.from_mapping(settings)))
    arguments += ["--config", str(tmp_path / "settings.toml"), "--dense.epochs", "2", "--training.batch-size", "256"]
    arguments += ["--precision", "no", "--out", str(tmp_path / "run")]
    save, times = torch.save, []

    def fill(*given: Any) -> None:
        times.append(1)
        if len(times) == 2:
            raise error
        save(*given)

    monkeypatch.setattr(torch, "save", fill)
    assert "what is finished is kept: go on with --resume" in fails_with_one_error(arguments, capsys)
    assert len(list((tmp_path / "run" / "state").glob("dense.epochs.*.pt"))) == 1
    assert not list((tmp_path / "run").rglob("*.tmp"))


# Streams


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("verb", ["report", "error", "--help", "prune --help"])
def test_no_character_makes_output_fail(
    tmp_path: Path, run: Path, verb: str, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    odd = tmp_path / "läufe 走 \udcff →"
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    arguments = {"report": ["report", str(run)], "error": ["report", str(odd)]}.get(verb, verb.split())
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        status = ended.value.code
    else:
        status = cli.main(arguments)
    assert status == (verb == "error")
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    assert "report.json' does not exist" in texts[1] if verb == "error" else len(texts[0]) > 100


def test_a_folder_whose_name_is_no_text_is_one_error_before_any_work(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
):
    """A name may hold any byte, but safetensors takes only text."""
    error = fails_with_one_error(prune(model, tmp_path / "run \udcff"), capsys)
    assert "run \\udcff' cannot be used as a run's folder" in error
    assert not list(tmp_path.iterdir())


def test_what_is_no_text_in_the_command_is_reported(tmp_path: Path, model: str):
    gohsp.run(
        model,
        "digits",
        "params=-20%",
        tmp_path / "run",
        widths=widths_from_json(PLAN),
        config=config.from_mapping({"device": "cpu", "calibration": {"images": 16}}),
        command=["gohsp", "prune", "\udcff"],
    )
    assert "\\udcff" in (tmp_path / "run" / "report.html").read_text()


SINKS = """
import os, sys
from gohsp import report
from gohsp.cli import main
report.write = lambda *_: None  # printing is what is tried
for sink in ("closed pipe", "/dev/full", "closed"):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(sys.argv[2] + "/" + sink.replace("/", "_"), os.O_WRONLY | os.O_CREAT), 2)
        if sink == "closed pipe":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
        elif sink == "closed":
            os.close(1)
            sys.stdout = None
        else:
            os.dup2(os.open(sink, os.O_WRONLY), 1)
        sys.exit(main(["report", sys.argv[1]]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_no_traceback(tmp_path: Path, run: Path):
    command = [sys.executable, "-c", SINKS, str(run), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["0", "1", "0"]
    assert (tmp_path / "closed pipe").read_text() == (tmp_path / "closed").read_text() == ""
    full = (tmp_path / "_dev_full").read_text()
    assert full.startswith("error: ")
    assert "No space left" in full
    assert full.count("\n") == 1


def test_a_reader_that_leaves_does_not_end_the_work(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    assert cli.main(prune(model, tmp_path / "run")) == 0
    assert report.read(tmp_path / "run")


# Seeds


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 10**400])
def test_a_nonsensical_seed_is_one_error_before_any_work(
    tmp_path: Path, model: str, seed: int, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    for arguments in (prune(model, out), ["rank", model, "--data", "digits", "--out", str(out)]):
        error = fails_with_one_error([*arguments, "--seed", str(seed)], capsys)
        assert "seed must be a whole number of at least 0 and at most 4294967295" in error
        assert not out.exists()


def test_the_largest_seed_works(tmp_path: Path, model: str):
    assert cli.main(prune(model, tmp_path / "run", "--seed", str(2**32 - 1))) == 0
