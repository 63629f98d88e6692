"""Experiment trackers: every epoch of training, told to TensorBoard, Weights & Biases, MLflow and others.

Accelerate has them all under one interface; nothing else of it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gohsp import config as configs
from gohsp.config import Config
from gohsp.errors import ConfigError, require_packages
from gohsp.runtime import Progress, ProgressCallback

PROJECT = "gohsp"
"""What trackers call all that is logged, and the folder's name of those that write files."""


@contextmanager
def tracking(
    trackers: Sequence[Any], folder: str | Path = "logs", *, config: Config | None = None
) -> Iterator[ProgressCallback]:
    """Log every epoch of every training stage, while the context is open.

    ::

        with gohsp.tracking(["tensorboard"]) as progress:
            gohsp.prune(model, images, "params=-40%", method="finetune", progress=progress)

    Values are named by their stage, such as ``finetune/top1``. The step is the number of epochs so far, of all stages.
    Trackers are opened at the first epoch, so that what is refused before the work leaves nothing with them.

    Args:
        trackers: Names that Accelerate has for trackers that are installed (``tensorboard``, ``wandb``, ``mlflow``), or
            ones of your own (``accelerate.tracking.GeneralTracker``).
        folder: Where those write that write files, below the name of the project, ``gohsp``.
        config: Settings to keep with them.

    Yields:
        What to give as ``progress``.

    Raises:
        ConfigError: A name of no tracker that is installed.
        MissingPackageError: Accelerate is not installed.
    """
    require_packages("tracking", "train", "accelerate")
    _require_known(trackers)
    opened: Any = None
    epochs: dict[str, int] = {}

    def tell(news: Progress) -> None:
        nonlocal opened
        if not news.metrics:
            return
        if opened is None:
            opened = _opened(trackers, folder, config)
        epochs[news.step] = int(news.metrics["epoch"])
        opened.log({f"{news.step}/{name}": of for name, of in news.metrics.items()}, step=sum(epochs.values()))

    try:
        yield tell
    finally:
        if opened is not None:
            opened.end_training()


def _require_known(trackers: Sequence[Any]) -> None:
    """Refuse what Accelerate would pass over in silence: a tracker whose package is not installed."""
    from accelerate.tracking import GeneralTracker, get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    for tracker in trackers:
        if not isinstance(tracker, GeneralTracker) and tracker not in installed:
            raise ConfigError(
                f"tracker {tracker!r} is none of Accelerate's that is installed, which are {installed}; install it, "
                "such as by pip install tensorboard"
            )


def _opened(trackers: Sequence[Any], folder: str | Path, config: Config | None) -> Any:
    from accelerate import Accelerator  # it takes seconds to import

    accelerator = Accelerator(log_with=list(trackers), project_dir=str(folder))
    accelerator.init_trackers(PROJECT, None if config is None else _flat(configs.to_mapping(config)))
    return accelerator


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in one table, by dotted names; trackers take numbers, truth values and texts."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
