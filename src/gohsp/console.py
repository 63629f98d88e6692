"""Where people read: results on standard output, progress and warnings on standard error."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from gohsp.runtime import Progress, ProgressCallback, unheard


class _Console(Console):
    """A console that outlives its reader."""

    def on_broken_pipe(self) -> None:
        """Nobody reads on: the rest is thrown away, and the work goes on."""
        _discard(self.file)


# Emoji codes are off: a path may hold one.
results = _Console(emoji=False)
notes = _Console(stderr=True, emoji=False)


PAUSE = 30.0
"""Seconds between two lines that say how far a step is, where no bar can be drawn."""


@contextmanager
def progress(*, hidden: bool = False) -> Iterator[ProgressCallback]:
    """What is to be told of progress: it draws a bar for every step, or prints lines where that is no terminal's.

    Args:
        hidden: Whether to show nothing.
    """
    if hidden:
        yield unheard
    elif notes.is_terminal:
        with _bars() as tell:
            yield tell
    else:
        yield _lines()


def _lines() -> ProgressCallback:
    """Lines on standard error: where a step begins, and from time to time how far it is."""
    began = said = time.monotonic()

    def tell(news: Progress) -> None:
        nonlocal began, said
        now = time.monotonic()
        if news.done == 0:
            began = said = now
            say(f"{news.step}: begins, {news.total} to do")
        elif now - said >= PAUSE:
            said = now
            minutes, seconds = divmod(round(now - began), 60)
            say(f"{news.step}: {news.done} of {news.total} after {minutes}:{seconds:02d}")

    return tell


@contextmanager
def _bars() -> Iterator[ProgressCallback]:
    """A bar for every step, on standard error, with count, time gone and time left."""
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=notes)

    def tell(news: Progress) -> None:
        if news.step not in tasks:
            tasks[news.step] = bars.add_task(news.step, total=news.total)
            bars.start()  # the first time; not earlier, so that what is refused is one line
        bars.update(tasks[news.step], completed=news.done, total=news.total)

    try:
        yield tell
    finally:
        if tasks:
            bars.stop()


def say(text: str) -> None:
    """Print a line on standard error as it is."""
    notes.print(text, markup=False, highlight=False, soft_wrap=True)


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
