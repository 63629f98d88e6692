"""Run folders: nothing is overwritten or resumed by accident, and a record vouches for its weights.

What users see of this, over whole runs, is in ``test_safety.py``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gohsp import files
from gohsp.errors import RunError, StorageError
from gohsp.runs import folder as folders
from gohsp.runs.folder import RunFolder

REQUEST: dict[str, Any] = {
    "model": "vit",
    "budget": "params=-40%",
    "plan": None,
    "config": {"seed": 0, "training": {"batch_size": 64}},
}


def begin(path: Path, request: dict[str, Any] = REQUEST, *, resume: bool = False, overwrite: bool = False) -> None:
    with folders.begin(path, request, resume=resume, overwrite=overwrite) as folder:
        assert folder.path == path


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    begin(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_new_or_empty_folder_is_begun(tmp_path: Path, exists: bool, resume: bool):
    path = tmp_path / "deep" / "run"
    if exists:
        path.mkdir(parents=True)
    begin(path, resume=resume)
    assert json.loads((path / "request.json").read_text()) == REQUEST


def test_a_folder_that_holds_a_run_is_refused(begun: Path):
    with pytest.raises(RunError, match="already holds a run; go on with --resume, replace it with --overwrite"):
        begin(begun)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_refused_even_to_be_overwritten(tmp_path: Path, overwrite: bool):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="holds files that are no gohsp run; name another folder"):
        begin(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(RunError, match="is a file or a broken link; name a folder"):
        begin(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run").read_text() == "precious"


def test_resume_and_overwrite_exclude_each_other(begun: Path):
    with pytest.raises(RunError, match="exclude each other"):
        begin(begun, resume=True, overwrite=True)


def test_resume_keeps_and_overwrite_removes(begun: Path):
    RunFolder(begun).record("rank", b'{"x": 1}')
    with folders.begin(begun, REQUEST, resume=True, overwrite=False) as folder:
        assert folder.done("rank") == b'{"x": 1}'
    changed = {**REQUEST, "budget": "params=-50%"}
    with folders.begin(begun, changed, resume=False, overwrite=True) as folder:
        assert folder.done("rank") is None
    assert sorted(p.name for p in begun.iterdir()) == ["request.json", "run.log"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "params=-50%"}, "budget = 'params=-40%', now it is 'params=-50%'"),
        ({"config": {"seed": 0, "training": {"batch_size": 32}}}, r"config\.training\.batch_size = 64, now it is 32"),
        ({"config": {"seed": 0, "training": {}}}, r"config\.training"),
        ({"plan": {"blocks.0.attn": {"heads": 1}}}, r"plan\.blocks\.0\.attn\.heads = None, now it is 1"),
        ({"weights": "w.safetensors"}, r"weights = None, now it is 'w\.safetensors'"),
    ],
)
def test_resuming_with_another_request_is_refused_naming_the_key(begun: Path, change: dict[str, Any], message: str):
    with pytest.raises(RunError, match=message):
        begin(begun, {**REQUEST, **change}, resume=True)
    assert json.loads((begun / "request.json").read_text()) == REQUEST


def test_tuples_in_a_request_are_the_lists_they_become(tmp_path: Path):
    request = {**REQUEST, "config": {"model_arguments": {"img_size": (8, 8)}}}
    begin(tmp_path / "run", request)
    begin(tmp_path / "run", request, resume=True)


def test_a_step_is_recorded_and_taken_up(begun: Path):
    folder, model, other = RunFolder(begun), nn.Linear(3, 2), nn.Linear(3, 2)
    assert folder.done("dense") is None
    folder.record("dense", b'{"curve": [1.5, null]}', model)
    assert folder.done("dense") == b'{"curve": [1.5, null]}'
    assert folder.done("dense", other) == b'{"curve": [1.5, null]}'
    assert torch.equal(other.weight, model.weight)
    folder.clear_state()
    assert folder.done("dense") is None
    assert not any((begun / "state").iterdir())
    folder.clear_state()


def test_a_step_counts_as_finished_only_after_its_weights(begun: Path, monkeypatch: pytest.MonkeyPatch):
    folder = RunFolder(begun)

    def fail(*_: Any) -> None:
        assert folder.done("dense") is None
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", fail)
    with pytest.raises(StorageError, match="No space left on device"):
        folder.record("dense", b"{}", nn.Linear(1, 1))
    assert folder.done("dense") is None


def test_a_step_that_is_done_again_takes_with_it_what_followed(begun: Path, caplog: pytest.LogCaptureFixture):
    folder = RunFolder(begun)
    for step in ("dense", "rank", "cut"):
        folder.record(step, step.encode(), nn.Linear(1, 1))
    folder.record_timings({"dense": 1.0})
    damaged = next((begun / "state").glob("rank.*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = RunFolder(begun)
    assert again.done("dense", nn.Linear(1, 1)) == b"dense"
    assert again.done("rank", nn.Linear(1, 1)) is None
    assert again.done("cut", nn.Linear(1, 1)) is None
    assert again.done("dense", nn.Linear(1, 1)) == b"dense"
    assert again.timings() == {"dense": 1.0}
    assert "is damaged" in caplog.text
    assert "step 'rank' is done anew, and with it what it led to: cut\n" in caplog.text


def test_the_log_goes_to_the_file_while_the_run_is_open(tmp_path: Path):
    logger = logging.getLogger("gohsp.somewhere")
    level = logging.getLogger("gohsp").level
    with folders.begin(tmp_path / "run", REQUEST, resume=False, overwrite=False):
        logger.info("within")
    logger.info("after")
    with folders.begin(tmp_path / "run", REQUEST, resume=True, overwrite=False):
        logger.warning("appended")
    text = (tmp_path / "run" / "run.log").read_text()
    assert "INFO gohsp.somewhere: within" in text
    assert "WARNING gohsp.somewhere: appended" in text
    assert "after" not in text
    assert (logging.getLogger("gohsp").level, logging.getLogger("gohsp").handlers) == (level, [])
