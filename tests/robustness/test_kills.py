"""A run that is killed, wherever that is, ends as one that was left alone once it is resumed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from robustness.child import Home, Stop
from robustness.runs import IDENTICAL, Job, Whole, fresh, outcome
from robustness.tally import Tally

SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM,) * 2 + (signal.SIGINT,) * 2
ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit statuses; 0 where a run was finished before the signal came."""


def resumed(job: Job, whole: Whole, home: Home) -> tuple[str, str]:
    """Go on to the end; nothing temporary may be left."""
    result, detail = outcome(whole, home, job.begin(home, "--resume").wait())
    left = os.listdir(home.temporary)
    return (f"{result}, but temporary files left", f"{left} {detail}") if left else (result, detail)


def killed_at_random(job: Job, whole: Whole, home: Home, chance: random.Random, *options: str) -> tuple[str, str, str]:
    """Begin or go on, and send a signal at a random moment; what was done, what is wrong at once, and more about it."""
    number, moment = chance.choice(SIGNALS), chance.uniform(0.0, whole.seconds)
    before = set(os.listdir(home.temporary)) if options else set()
    command = job.begin(home, *options)
    command.wait_for("begun")
    time.sleep(moment)
    command.signal(number)
    ended = command.wait()
    left = set(os.listdir(home.temporary)) - before
    wrong = ""
    if ended.crashed:
        wrong = "traceback"
    elif number != signal.SIGKILL and left:
        wrong = "temporary files left"
    elif ended.status not in (ENDS[number], 0):
        wrong = f"exit status {ended.status}"
    return f"{number.name} after {moment:.2f} s", wrong, f"exit status {ended.status}, {ended.tail}"


@pytest.fixture
def kills(pytestconfig: pytest.Config) -> int:
    return pytestconfig.getoption("kills")


def test_a_run_killed_at_any_moment_ends_as_one_left_alone(
    job: Job, whole: Whole, tmp_path: Path, kills: int, say: Callable[[str], None]
):
    """A quarter of them is killed again while it goes on."""
    chance = random.Random(0)
    tally = Tally("runs killed at random", kills, (IDENTICAL,), say)
    for number in range(kills):
        home = fresh(Home(tmp_path / "killed"))
        how, result, detail = killed_at_random(job, whole, home, chance)
        if chance.random() < 0.25 and not result:
            again, result, detail = killed_at_random(job, whole, home, chance, "--resume")
            how = f"{how}, {again}"
        if not result:
            result, detail = resumed(job, whole, home)
        tally.add(result, how.split()[0], f"run {number}, {how}: {detail}")
    tally.require_good()


def test_a_run_killed_at_any_change_of_its_folder_ends_as_one_left_alone(
    job: Job, whole: Whole, tmp_path: Path, kills: int, say: Callable[[str], None]
):
    """Before every rename, new folder and removal, and so after the one before it, too."""
    changes = dict(enumerate(whole.changes, 1))
    spread = {1 + round(i / max(kills, 1) * (len(changes) - 1)) for i in range(kills + 1)}
    moments = sorted(spread | {i for i, change in changes.items() if "rename" in change and "report.html" in change})
    tally = Tally(f"runs killed at one of {len(changes)} changes", len(moments), (IDENTICAL,), say)
    for moment in moments:
        home = fresh(Home(tmp_path / "killed"))
        ended = job.begin(home, stop=Stop(moment)).wait()
        assert ended.status == -signal.SIGKILL, ended
        result, detail = resumed(job, whole, home)
        tally.add(result, changes[moment], f"before change {moment}: {detail}")
    tally.require_good()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(job: Job, whole: Whole, tmp_path: Path):
    home = Home(tmp_path)
    first = job.begin(home, stop=Stop(len(whole.changes) // 2, signal.SIGSTOP))
    first.wait_for("stopped")
    try:
        others = [job.begin(Home(tmp_path), option, output=option) for option in ("--resume", "--overwrite")]
        refused = [other.wait() for other in others]
    finally:
        first.signal(signal.SIGCONT)
    ended = first.wait()
    assert all(other.refused for other in refused), refused
    assert outcome(whole, home, ended) == (IDENTICAL, "")
