"""What a run never does: lose a file of the user's, lose work that was done, or go on from damaged state."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import gohsp
from gohsp import cli, config, report, steps
from gohsp.data import Spool
from gohsp.errors import RunError, StorageError
from gohsp.structure import widths_from_json, widths_to_json

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
PLAN = {
    "blocks.0.attn": {"heads": 3, "qk": 4, "vo": 6},
    "blocks.0.mlp": {"units": 50},
    "blocks.1.attn": {"heads": 4, "qk": 8, "vo": 8},
    "blocks.1.mlp": {"units": 7},
}
CALIBRATION = {"images": 32, "holdout": 8}
ONESHOT: dict[str, Any] = {
    "method": "oneshot",
    "device": "cpu",
    "calibration": CALIBRATION,
    "latency": {"rounds": 1},
}
ONE_EPOCH = {"epochs": 1, "learning_rate": 3e-3, "warmup": 0.0}
TRAINED: dict[str, Any] = {
    "method": "gohsp",
    "device": "cpu",
    "precision": "no",
    "model_arguments": {k: v for k, v in SMALL.items() if k != "num_classes"},
    "calibration": CALIBRATION,
    "latency": {"rounds": 1},
    "dense": {**ONE_EPOCH, "epochs": 2},
    "admm": ONE_EPOCH,
    "finetune": ONE_EPOCH,
    "training": {"batch_size": 256, "augment": "none"},
    "compare_dense": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    gohsp.save(timm.create_model("vit_tiny_patch16_224", **SMALL), folder)
    return folder


@pytest.fixture(autouse=True)
def _plain_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of a report take longer than these runs."""
    monkeypatch.setattr("gohsp.report.html.render_html", lambda _: "<html></html>")


def run(model: Any, out: Path, settings: dict[str, Any] = ONESHOT, **options: Any) -> gohsp.RunResult:
    given = {"budget": "params=-20%", "widths": widths_from_json(PLAN), "config": config.from_mapping(settings)}
    return gohsp.run(model, "digits", out=out, **{**given, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(of: nn.Module | Path) -> torch.Tensor:
    network = gohsp.load(of) if isinstance(of, Path) else of
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def flip(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# What is the user's


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(tmp_path: Path, model: Path):
    out = tmp_path / "run"
    run("vit_tiny_patch16_224", out, TRAINED, widths=None)
    assert (out / "dense" / "config.json").exists()
    mine = {
        name: name.encode() for name in ("notes.txt", "dense/notes.txt", "figures/a.png", "state/mine.json", ".x.tmp")
    }
    for name, content in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    result = run(model, out, overwrite=True)
    left = contents(out)
    assert {name: left[name] for name in mine} == mine
    assert not (out / "dense" / "config.json").exists()
    assert result.report.model.arguments["num_classes"] == 10
    assert torch.equal(weights(out), weights(result.model))


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("the model", {"model": "OUT"}),
        ("the model", {"model": "OUT/dense"}),
        ("the model", {"model": "OUT/link"}),
        ("the weights file", {"model": "vit_tiny_patch16_224", "weights": "OUT/model.safetensors"}),
        ("the data", {"source": "OUT/images"}),
        ("the data", {"source": "hfds/OUT/images"}),
    ],
)
def test_an_input_in_the_folder_that_would_be_overwritten_is_refused(
    tmp_path: Path, model: Path, what: str, options: dict[str, str]
):
    out = tmp_path / "run"
    out.mkdir()
    request = json.dumps({"budget": "params=-20%", "config": {"dense": {"epochs": 1}}})
    (out / "request.json").write_text(request)
    gohsp.save(gohsp.load(model), out)
    gohsp.save(gohsp.load(model), out / "dense")
    (out / "images" / "train" / "0").mkdir(parents=True)
    (out / "link").symlink_to(out / "dense")
    before = contents(out)
    given = {"model": str(model), "source": "digits", "budget": "params=-20%"}
    given |= {name: text.replace("OUT", str(out)) for name, text in options.items()}
    with pytest.raises(RunError, match=rf"{what} '.*' lies in '.*run', whose run would be overwritten"):
        gohsp.run(**given, out=out, overwrite=True, config=config.from_mapping(ONESHOT))
    assert contents(out) == before


@pytest.mark.parametrize(
    ("flag", "what", "name"),
    [("plan", "the plan", "plan.json"), ("config", "the settings file", "settings.toml")],
)
def test_a_plan_or_settings_in_the_folder_that_would_be_overwritten_are_refused(
    tmp_path: Path, model: Path, flag: str, what: str, name: str, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    run(model, out)
    before = contents(out)
    arguments = ["prune", str(model), "--data", "digits", "--budget", "params=-20%", "--out", str(out), "--overwrite"]
    assert cli.main([*arguments, f"--{flag}", str(out / name)]) == 1
    assert f"{what} '{out / name}' lies in '{out}'" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize("content", ['{"url": "https://example.org"}', "[1]", '{"config": 1, "budget": 2}'])
def test_a_folder_with_a_request_of_another_program_is_no_run(tmp_path: Path, model: Path, content: str):
    (tmp_path / "request.json").write_text(content)
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    before = contents(tmp_path)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RunError, match="holds files that are no gohsp run"):
            run(model, tmp_path, **options)
    assert contents(tmp_path) == before


def test_a_file_that_no_run_wrote_is_not_written_over(tmp_path: Path, model: Path):
    out = tmp_path / "run"
    run(model, out)
    (out / "dense").mkdir()
    (out / "dense" / "config.json").write_text("precious")
    before = contents(out)
    with pytest.raises(RunError, match=r"dense/config\.json' is in the way and no run wrote it"):
        run("vit_tiny_patch16_224", out, TRAINED, widths=None, overwrite=True)
    assert contents(out) == before


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "params=1"},
        {"source": "no/such/folder"},
        {"model": "no-such-model"},
        {"config": config.from_mapping({**ONESHOT, "data": {"train_split": "trian"}})},
    ],
    ids=["budget", "data", "model", "split"],
)
def test_an_earlier_run_stays_until_the_new_one_has_passed_its_checks(
    tmp_path: Path, model: Path, options: dict[str, Any]
):
    out = tmp_path / "run"
    run(model, out)
    before = contents(out)
    given = {"model": model, "source": "digits", "budget": "params=-20%", "config": config.from_mapping(ONESHOT)}
    with pytest.raises(gohsp.GohspError):
        gohsp.run(**{**given, **options}, out=out, overwrite=True)
    assert contents(out) == before


def test_an_earlier_run_stays_where_there_is_no_room_for_a_new_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    run(model, out)
    before = contents(out)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(StorageError, match=r"request\.json' cannot be written \(No space left on device\)"):
            run(model, out, overwrite=True)
    assert contents(out) == before


def test_an_overwriting_that_is_cut_off_can_be_taken_up(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    run(model, out)
    unlink = Path.unlink

    def unlink_some(self: Path, *arguments: Any, **options: Any) -> None:
        if self == out / "plan.json":
            raise KeyboardInterrupt
        unlink(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_some)
        with pytest.raises(KeyboardInterrupt):
            run(model, out, overwrite=True, budget="params=-25%")
    assert not (out / "report.json").exists()
    assert (out / "plan.json").exists()
    assert run(model, out, overwrite=True, budget="params=-25%").report.budget.requested == "params=-25%"


# Damaged state

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda _: b"",
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "flipped": flip,
    "foreign": lambda _: b'{"plan": [], "widths": 3}',
}


def interrupted(where: str, monkeypatch: pytest.MonkeyPatch, model: Any, out: Path, *arguments: Any, **options: Any):
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, out, *arguments, **options)


def state_file(out: Path, kind: str) -> Path:
    """The one file of a kind such as ``cut.json``, whose name has a hash besides."""
    (file,) = (out / "state").glob(f"{Path(kind).stem}.*{Path(kind).suffix}")
    return file


def test_damaged_state_is_made_anew_and_said(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = {**ONESHOT, "heal": {"epochs": 1}}
    whole = run(model, tmp_path / "whole", settings)
    out = tmp_path / "run"
    interrupted("gohsp.report.write", monkeypatch, model, out, settings)
    records = ("timings.json", "rank.json", "allocate.json", "cut.json", "heal.json")
    for kind, damage in zip((*records, "cut.safetensors", "heal.safetensors"), itertools.cycle(DAMAGES)):
        file = state_file(out, kind)
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        caplog.clear()
        interrupted("gohsp.report.write", monkeypatch, model, out, settings, resume=True)
        assert f"'{file}' is damaged" in caplog.text
    state_file(out, "cut.safetensors").unlink()
    result = run(model, out, settings, resume=True)
    assert torch.equal(weights(result.model), weights(whole.model))
    for key in ("plan", "ranking", "fidelity", "heal", "budget", "equality"):
        assert getattr(result.report, key) == getattr(whole.report, key), key


def test_damaged_state_of_training_is_made_anew_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    given = ("vit_tiny_patch16_224", tmp_path / "run", TRAINED)
    whole, out = run(given[0], tmp_path / "whole", given[2], widths=None), given[1]
    kinds = ("finetune.epochs.pt", "admm.safetensors", "repair.json", "dense.safetensors", None)
    for kind, damage in zip(kinds, itertools.cycle(DAMAGES)):
        caplog.clear()
        interrupted("gohsp.report.write", monkeypatch, *given, widths=None, resume=True)
        assert caplog.text.count("is damaged") == (kind != kinds[0])
        if kind is not None:
            file = state_file(out, kind)
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
        if kind == "finetune.epochs.pt":  # in its last epoch
            state_file(out, "finetune.json").unlink()
    result = run(*given, widths=None, resume=True)
    assert torch.equal(weights(result.model), weights(whole.model))
    assert result.report.pruned == whole.report.pruned


@pytest.mark.parametrize("damage", [*DAMAGES, "nested", "folder"])
def test_a_damaged_report_is_one_clear_error(
    tmp_path: Path, model: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    run(model, out)
    file = out / "report.json"
    if damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "nested":
        file.write_text("[" * 100_000)
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert cli.main(["report", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: '{file}'")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_no_digit_of_a_report_changes_unseen(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    run(model, out)
    text = (out / "report.json").read_text()
    seen = text.index('"achieved": ') + len('"achieved": ')
    (out / "report.json").write_text(text[:seen] + "9" + text[seen + 1 :])
    assert cli.main(["report", str(out)]) == 1
    assert "is not as it was written" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["resume", "overwrite"])
@pytest.mark.parametrize("damage", ["emptied", "truncated", "nested"])
def test_a_damaged_request_is_one_clear_error(
    tmp_path: Path, model: Path, damage: str, option: str, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    interrupted("gohsp.report.write", monkeypatch, model, out)
    file = out / "request.json"
    file.write_bytes(b"[" * 100_000 if damage == "nested" else DAMAGES[damage](file.read_bytes()))
    before = contents(out)
    with pytest.raises(RunError, match=r"request\.json' is damaged"):
        run(model, out, **{option: True})
    assert contents(out) == before


@pytest.mark.parametrize("flag", ["config", "plan"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, None], ids=["empty", "bytes", "nested", "folder"]
)
def test_damaged_settings_or_a_damaged_plan_are_one_clear_error(
    tmp_path: Path, model: Path, flag: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "given"
    file.mkdir() if content is None else file.write_bytes(content)
    arguments = ["prune", str(model), "--data", "digits", "--budget", "params=1", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, f"--{flag}", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert content == b"" or str(file) in error
    assert not (tmp_path / "run").exists()


# An end at any moment


def test_resuming_a_finished_run_returns_its_result_and_cleans_up(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    interrupted("gohsp.runs.folder.RunFolder.clear_state", monkeypatch, model, out)
    assert any((out / "state").glob("cut.*"))
    monkeypatch.setattr("gohsp.steps.analyse", interrupt)
    result = run(model, out, resume=True)
    assert result.report == report.read(out)
    assert widths_to_json(result.report.plan.pruned) == PLAN
    assert torch.equal(weights(result.model), weights(out))
    assert not (out / "state").exists()
    with pytest.raises(RunError, match=r"config\.seed = 0, now it is 1"):
        run(model, out, {**ONESHOT, "seed": 1}, resume=True)


@pytest.mark.parametrize("leftover", ["nothing", "folder", "lock", "temporary"])
def test_an_end_before_the_first_file_starts_clean(tmp_path: Path, model: Path, leftover: str):
    out = tmp_path / "run"
    if leftover != "nothing":
        (out / "state").mkdir(parents=True)
    if leftover in ("lock", "temporary"):
        (out / "state" / "lock").touch()
    if leftover == "temporary":
        (out / ".request.json.123.tmp").write_text("{")
    run(model, out, resume=True)
    assert not (out / "state").exists()
    assert not list(out.glob(".*"))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    analyse, refused = steps.analyse, []

    def second(*arguments: Any, **options: Any) -> Any:
        before = contents(out)
        for option in ("resume", "overwrite"):
            with pytest.raises(RunError, match="another process works in") as error:
                run(model, out, **{option: True})
            refused.append(error)
        assert contents(out) == before
        return analyse(*arguments, **options)

    monkeypatch.setattr("gohsp.runs.folder._PATIENCE", 0.1)
    monkeypatch.setattr("gohsp.steps.analyse", second)
    run(model, out)
    assert len(refused) == 2


@pytest.mark.parametrize(("end", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_termination_ends_a_command_as_an_interruption_does(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    model: Path,
    end: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    def signalled(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), end)
        time.sleep(1)

    handler, before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))  # a suite in the background ignores it
    monkeypatch.setattr("gohsp.steps.analyse", signalled)
    out = str(tmp_path / "run")
    word = "terminated" if end == signal.SIGTERM else "interrupted"
    with caplog.at_level(logging.CRITICAL):
        arguments = ["--data", "digits", "--out", out]
        assert cli.main(["prune", str(model), "--budget", "params=-20%", *arguments]) == status
        assert capsys.readouterr().err.endswith(f"{word}; what is finished is kept: go on with --resume\n")
        assert not list(tmp_path.rglob("[0-9]*.safetensors"))  # of spools
        assert cli.main(["rank", str(model), *arguments]) == status
        assert capsys.readouterr().err.endswith(f"{word}\n")
    assert signal.getsignal(signal.SIGTERM) == handler


class Finalized:
    """Has work to do when it goes, in one of Python's three ways, none of which passes an exception on."""

    def __init__(self, how: str, work: Callable[[], object]) -> None:
        self.work = work if how == "__del__" else lambda: None
        self.generator = self.steps(work) if how == "generator" else iter([None])
        next(self.generator)
        if how == "weakref":
            weakref.finalize(self, work)

    def __del__(self) -> None:
        self.work()

    @staticmethod
    def steps(work: Callable[[], object]) -> Iterator[None]:
        try:
            yield
        finally:
            work()


@pytest.mark.parametrize(
    ("how", "end", "status"),
    [("__del__", signal.SIGTERM, 143), ("weakref", signal.SIGINT, 130), ("generator", signal.SIGTERM, 143)],
)
def test_no_interruption_is_lost_in_a_finalizer(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    model: Path,
    how: str,
    end: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def signalled() -> None:
        os.kill(os.getpid(), end)
        time.sleep(1)

    def finalize(*_: Any, **__: Any) -> Any:
        Finalized(how, signalled)
        until = time.monotonic() + 5
        while time.monotonic() < until:  # a repeated signal ends no sleep
            time.sleep(0.01)
        raise AssertionError("the work went on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    hook = sys.unraisablehook
    monkeypatch.setattr("gohsp.steps.analyse", finalize)
    arguments = ["prune", str(model), "--budget", "params=-20%", "--data", "digits", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == status
    printed = capsys.readouterr().err
    assert printed.endswith("what is finished is kept: go on with --resume\n")
    assert "Traceback" not in printed
    assert sys.unraisablehook is hook


def test_a_second_interruption_while_the_first_is_said_shows_no_traceback(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gohsp.cli.evaluate", interrupt)
    monkeypatch.setattr("gohsp.console.notes.print", interrupt)
    assert cli.main(["evaluate", str(model), "--data", "digits"]) == 130


@pytest.mark.parametrize("place", ["gohsp.cli._ended", "gohsp.console.tolerate_any_character"])
def test_an_interruption_before_or_after_the_work_shows_no_traceback(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []

    def interrupt_once(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt_once)
    assert cli.main(["report", str(tmp_path / "none")]) == 130


def test_what_a_spool_holds_goes_even_if_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spool, rmtree, calls = Spool(tmp_path), shutil.rmtree, []
    spool.append(torch.zeros(2))

    def interrupted_once(*given: Any, **options: Any) -> None:
        calls.append(given)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(*given, **options)

    monkeypatch.setattr("shutil.rmtree", interrupted_once)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)  # a test runner reports it
    del spool
    assert not list(tmp_path.iterdir())
