"""Steps of a run: each result is kept in the run's folder, and restored from there by a later attempt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pydantic import TypeAdapter
from torch import nn

from gohsp.runs.folder import RunFolder
from gohsp.session import Steps

T = TypeVar("T")


@dataclass(frozen=True)
class KeptSteps(Steps):
    """Steps that a run's folder keeps.

    Attributes:
        folder: The folder.
    """

    folder: RunFolder | None = None

    def do(self, name: str, of: type[T], compute: Callable[[], T], model: nn.Module | None = None) -> T:
        """Take a step's result, and what it left of ``model``, from the folder, or do the step and keep them."""
        assert self.folder is not None
        adapter = TypeAdapter(of)
        if (record := self.folder.done(name, model)) is not None:
            return adapter.validate_json(record)
        with self.timed(name):
            result = compute()
        self.folder.record(name, adapter.dump_json(result), model)
        return result

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent to a step's, for later attempts at the run, too."""
        assert self.folder is not None
        with super().timed(name):
            yield
        self.folder.record_timings(self.seconds)
