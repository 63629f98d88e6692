"""Where people read: results on standard output, progress and warnings on standard error."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import IO

from rich.console import Console


class _Console(Console):
    """A console that outlives its reader."""

    def on_broken_pipe(self) -> None:
        """Nobody reads on: the rest is thrown away, and the work goes on."""
        _discard(self.file)


# Emoji codes are off: a path may hold one.
results = _Console(emoji=False)
notes = _Console(stderr=True, emoji=False)


def tolerate_any_character() -> None:
    """Let standard output and error escape what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def deliver() -> None:
    """Flush the results.

    Raises:
        OSError: They cannot be written; that nobody reads them is no failure.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def _discard(stream: IO[str]) -> None:
    """Send the rest of a stream nowhere; what it still holds would fail again when the process ends."""
    with suppress(OSError):  # it stands for no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
