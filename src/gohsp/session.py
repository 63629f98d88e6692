"""What every step of a pruning works with: settings, images, the objective, precision, and who is told of progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from gohsp.config import Config
from gohsp.core.capture import Trunk
from gohsp.core.objective import Objective, mean_distance, outputs
from gohsp.data.calibration import CalibrationSet, Store
from gohsp.data.spool import Spool
from gohsp.runtime import ProgressCallback, fast_attention, unheard

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Steps:
    """Does the steps of a pruning one after the other, and times them. A run's also keeps and restores them.

    Attributes:
        seconds: Time by step, so far.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    def do(self, name: str, of: type[T], compute: Callable[[], T], model: nn.Module | None = None) -> T:
        """Do a step.

        Args:
            name: Its name.
            of: Type of its result, a dataclass.
            compute: Does it.
            model: What it changes in place besides.

        Returns:
            Its result.
        """
        del of, model  # for those who keep results
        with self.timed(name):
            return compute()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent to a step's."""
        began = time.perf_counter()
        logger.info("%s: begins", name)
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
        logger.info("%s: %.1f s", name, self.seconds[name])


@dataclass(frozen=True)
class Session:
    """What every step works with.

    Attributes:
        config: All settings.
        calibration: Images.
        objective: What outputs are for.
        precision: Data type of passes through models.
        steps: Does steps.
        progress: Is told how far they are.
        store: Where streams are kept between blocks.
    """

    config: Config
    calibration: CalibrationSet
    objective: Objective
    precision: torch.dtype
    steps: Steps = field(default_factory=Steps)
    progress: ProgressCallback = unheard
    store: Store = Spool

    @property
    def probe(self) -> Tensor:
        """A few images ``[B, C, H, W]``, to see that two models compute the same."""
        return self.calibration.first(8)[0]

    @torch.no_grad()  # and not by a block, which would stay open where nobody takes the rest
    def entered(self, trunk: Trunk, images: Iterable[Tensor], *, mirror: bool = False) -> Iterator[Tensor]:
        """What enters the first block, in batches, in float32; with ``mirror`` that of the mirror images follows."""
        for batch in images:
            yield trunk.enter(batch).float()
            if mirror:
                yield trunk.enter(batch.flip(-1)).float()

    def outputs(self, model: nn.Module, images: Iterable[Tensor]) -> list[Tensor]:
        """What counts of a model's outputs, in batches."""
        with fast_attention(self.precision, model):
            return outputs(model, self.objective, images, self.precision)

    def distance(self, dense: nn.Module, other: nn.Module, images: Iterable[Tensor]) -> float:
        """Mean distance of a model's outputs from the dense one's."""
        batches = list(images)
        return mean_distance(self.objective, self.outputs(dense, batches), self.outputs(other, batches))
