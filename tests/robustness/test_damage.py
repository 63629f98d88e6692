"""A damaged file of a run is made anew or refused: no traceback, and no other result."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robustness.child import Ended, Home, Stop, gohsp, lasting
from robustness.runs import IDENTICAL, REFUSED, Job, Whole, fresh, outcome
from robustness.tally import Tally

Damage = Callable[[bytes, random.Random], bytes]
AS_DAMAGED = "reads what it says"
"""What may become of a flipped bit in a finished run's files: they are the user's to change."""


def flipped(data: bytes, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    spoilt[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


def not_finite(data: bytes, chance: random.Random) -> bytes:
    """A number of a JSON text, or four bytes of the tensors, made NaN."""
    if not data.startswith((b"{", b"[")):
        at = 8 * chance.randrange(len(data) // 16, len(data) // 8) - 8
        return data[:at] + b"\x00\x00\xc0\x7f" + data[at + 4 :]
    numbers = list(re.finditer(rb"(?<=[\s\[:])-?\d+(\.\d+)?([eE][-+]?\d+)?", data))
    if not numbers:
        return b"NaN"
    found = chance.choice(numbers)
    return data[: found.start()] + chance.choice([b"NaN", b"Infinity", b"1e999"]) + data[found.end() :]


DAMAGES: dict[str, Damage | None] = {
    "cut off": lambda data, chance: data[: chance.randrange(len(data))],
    "emptied": lambda *_: b"",
    "a bit flipped": flipped,
    "other JSON": lambda _, chance: chance.choice([b"[]", b"{}", b"3", b'"x"', b"null", b"[[]]", b'{"a": 1}']),
    "NaN": not_finite,
    "removed": None,
}


def damage(folder: Path, chance: random.Random) -> tuple[str, str]:
    """Damage one of the files below a folder; returns which and how."""
    files = (path for path in folder.rglob("*") if lasting(path, folder) and path.is_file() and path.stat().st_size)
    path = chance.choice(sorted(files))
    how = chance.choice(list(DAMAGES))
    if change := DAMAGES[how]:
        path.write_bytes(change(path.read_bytes(), chance))
    else:
        path.unlink()
    return str(path.relative_to(folder)), how


@pytest.fixture
def damages(pytestconfig: pytest.Config) -> int:
    return pytestconfig.getoption("damages")


@pytest.fixture(scope="module")
def interrupted(job: Job, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs, killed a third and two thirds of the way to their report, and right before it."""
    folders = []
    reported = next(i for i, change in enumerate(whole.changes, 1) if "rename" in change and "report.json" in change)
    for third in (1, 2, 3):
        home = Home(tmp_path_factory.mktemp("interrupted"))
        job.begin(home, stop=Stop(third * reported // 3)).wait()
        kept = home.path / "kept"
        kept.mkdir()
        home.run.rename(kept / "run")
        folders.append(kept)
    return folders


def test_a_run_whose_files_were_damaged_ends_the_same_or_is_refused(
    job: Job, whole: Whole, interrupted: list[Path], tmp_path: Path, damages: int, say: Callable[[str], None]
):
    tally = Tally("damaged runs gone on with", damages - damages // 4, (IDENTICAL, REFUSED), say)
    for number in range(damages - damages // 4):
        chance = random.Random(number)
        home = fresh(Home(tmp_path / "damaged"))
        shutil.copytree(chance.choice(interrupted), home.path, dirs_exist_ok=True)
        file, how = damage(home.path, chance)
        result, detail = outcome(whole, home, job.begin(home, "--resume").wait())
        tally.add(result, f"{file} {how}", f"damage {number}: {detail}")
    tally.require_good()


def shown(verb: str, ended: Ended, home: Home) -> tuple[str, bytes]:
    """What a command on a finished run shows: what it printed, and the page that it made."""
    return ended.output, (home.run / "report.html").read_bytes() if verb == "report" else b""


def test_a_damaged_finished_run_shows_the_same_or_is_refused(
    job: Job, whole: Whole, tmp_path: Path, damages: int, say: Callable[[str], None]
):
    verbs = {"report": [], "evaluate": ["--data", str(job.images), "--json"]}
    home, expected = Home(tmp_path / "damaged"), {}

    def call(verb: str) -> Ended:
        return gohsp([verb, str(home.run), *verbs[verb]], home).wait()

    def copy() -> None:
        fresh(home)
        shutil.copytree(whole.home.run, home.run)

    for verb in verbs:
        copy()
        expected[verb] = shown(verb, call(verb), home)
    tally = Tally("damaged finished runs", damages // 4, (IDENTICAL, REFUSED, AS_DAMAGED), say)
    for number in range(damages // 4):
        chance = random.Random(number)
        copy()
        file, how = damage(home.run, chance)
        verb = chance.choice(list(verbs))
        ended = call(verb)
        if ended.crashed:
            result = "traceback"
        elif ended.status:
            result = REFUSED if ended.refused else f"exit status {ended.status}"
        elif shown(verb, ended, home) == expected[verb]:
            result = IDENTICAL
        else:
            result = AS_DAMAGED if how == "a bit flipped" else "different"
        tally.add(result, f"{verb} with {file} {how}", f"damage {number}: {ended.tail}")
    tally.require_good()
