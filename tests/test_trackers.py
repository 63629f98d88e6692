"""What experiment trackers hear of training, by a tracker that remembers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking as accelerates
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gohsp
from gohsp import cli
from gohsp.config import Config, StageSettings
from gohsp.errors import ConfigError, GohspError


class Remembered(GeneralTracker):
    """A tracker that writes nothing."""

    name, requires_logging_directory, tracker = "tensorboard", True, None
    opened: list[Remembered]

    def __init__(self, project: str = "", folder: str = "") -> None:
        super().__init__()
        self.project, self.folder, self.settings = project, folder, {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        self.opened.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Remembered]:
    """Trackers made so far; that of the name ``tensorboard`` is of this class, and the only one installed."""
    monkeypatch.setattr(Remembered, "opened", [], raising=False)
    monkeypatch.setattr(accelerates, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, "tensorboard", Remembered)
    return Remembered.opened


@pytest.fixture
def batches(images: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 5), batch_size=16)


TWO = Config(finetune=StageSettings(epochs=2), precision="no")


def test_every_epoch_is_logged_with_its_stage_and_its_place(
    model: nn.Module, batches: DataLoader[Any], opened: list[Remembered], tmp_path: Path
):
    with gohsp.tracking(["tensorboard"], tmp_path, config=TWO) as progress:
        curve = gohsp.finetune(model, batches, validation=batches, config=TWO, progress=progress)
        (tracker,) = opened
        assert not tracker.finished
    assert (tracker.project, tracker.folder, tracker.finished) == ("gohsp", str(tmp_path), True)
    assert [step for step, _ in tracker.logged] == [1, 2]
    for (_, logged), epoch in zip(tracker.logged, curve, strict=True):
        assert logged["finetune/top1"] == epoch.top1
        assert logged["finetune/train_loss"] == epoch.train_loss
    assert tracker.settings["finetune.epochs"] == 2
    assert tracker.settings["training.optimizer"] == "adamw"


def test_epochs_of_all_stages_count_on(
    model: nn.Module, batches: DataLoader[Any], opened: list[Remembered], tmp_path: Path
):
    config = gohsp.config.from_mapping(
        {"precision": "no", "admm": {"epochs": 1}, "finetune": {"epochs": 2}, "widths": {"multiple": 2, "min_width": 2}}
    )
    mine = Remembered()
    with gohsp.tracking([mine], tmp_path) as progress:
        gohsp.prune(model, batches, "params=-20%", method="gohsp", config=config, progress=progress)
    assert opened == [mine]
    assert [(step, *sorted(values)[:1]) for step, values in mine.logged] == [
        (1, "admm/epoch"),
        (2, "finetune/epoch"),
        (3, "finetune/epoch"),
    ]
    assert "finetune/top1" not in mine.logged[-1][1]  # nothing was scored


def test_what_trains_nothing_opens_no_tracker(
    model: nn.Module, images: Tensor, opened: list[Remembered], tmp_path: Path
):
    with gohsp.tracking(["tensorboard"], tmp_path) as progress:
        gohsp.rank(model, [images], progress=progress)
    assert opened == []


@pytest.mark.parametrize("name", ["wandb", "tensorbord"])
def test_a_tracker_that_is_not_there_is_refused(name: str):
    """Accelerate passes over the first in silence."""
    with pytest.raises(ConfigError, match=f"tracker '{name}' .* installed, which are \\['tensorboard'\\]"):
        gohsp.tracking([name]).__enter__()


def test_the_command_line_tells_trackers(
    tmp_path: Path, opened: list[Remembered], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(*_: Any, progress: Any, **_options: Any) -> Any:
        progress(gohsp.Progress("finetune", 1, 2))
        progress(gohsp.Progress("finetune", 2, 2, {"epoch": 1, "train_loss": 0.5}))
        raise GohspError("enough")

    monkeypatch.setattr("gohsp.runs.run", run)
    arguments = ["prune", "dense", "--data", "digits", "--budget", "params=-20%", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--tracker", "wandb"]) == 1
    assert "tracker 'wandb'" in capsys.readouterr().err
    assert cli.main(arguments) == 1
    assert opened == []
    assert cli.main([*arguments, "--tracker", "tensorboard", "--seed", "3"]) == 1
    (tracker,) = opened
    assert (tracker.folder, tracker.settings["seed"], tracker.finished) == (str(tmp_path / "run" / "logs"), 3, True)
    assert tracker.logged == [(1, {"finetune/epoch": 1, "finetune/train_loss": 0.5})]
