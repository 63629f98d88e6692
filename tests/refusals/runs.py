"""Folders of runs that cannot be used as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gohsp
from gohsp import report
from gohsp.errors import RunError
from refusals import Refusal

TITLE = "Run folders"

REQUEST = json.dumps({"budget": "params=-40%", "config": {}})


def run(out: str | Path, **options: Any) -> object:
    given = {"model": "vit_tiny_patch16_224", "source": "digits", "budget": "params=-40%"}
    return gohsp.run(**{**given, **options}, out=out)


def in_a_file(folder: Path) -> object:
    (folder / "file").touch()
    return run(folder / "file" / "run")


def a_file(folder: Path) -> object:
    (folder / "file").touch()
    return run(folder / "file")


def a_loop(folder: Path) -> object:
    (folder / "loop").symlink_to(folder / "loop")
    return run(folder / "loop")


def of_others(folder: Path) -> object:
    (folder / "thesis.tex").touch()
    return run(folder, overwrite=True)


def of_a_run(folder: Path, **options: Any) -> object:
    (folder / "request.json").write_text(REQUEST)
    return run(folder, **options)


def damaged(folder: Path) -> object:
    (folder / "request.json").write_text(REQUEST[:-5])
    return run(folder, resume=True)


def input_inside(folder: Path) -> object:
    (folder / "dense").mkdir()
    return of_a_run(folder, model=str(folder / "dense"), overwrite=True)


def first_edition(folder: Path) -> object:
    (folder / "report.json").write_text('{"schema_version": 3}')
    return report.read(folder)


def damaged_report(folder: Path) -> object:
    (folder / "report.json").write_text('{"schema_version": 4')
    return report.read(folder)


CASES = (
    Refusal("an empty name of a run's folder", lambda _: run(""), RunError, "'.' for this one"),
    Refusal("a file as a run's folder", a_file, RunError, "is a file"),
    Refusal("a link to itself as a run's folder", a_loop, RunError, "a broken link"),
    Refusal("a run's folder inside a file", in_a_file, RunError, "Not a directory"),
    Refusal("a name of a run's folder that is too long", lambda at: run(at / ("x" * 300)), RunError, "name too long"),
    Refusal("a run in a folder of other files, to be overwritten", of_others, RunError, "no gohsp run"),
    Refusal("a run in the folder of another one", of_a_run, RunError, "--resume"),
    Refusal(
        "a run both to be resumed and overwritten",
        lambda at: of_a_run(at, resume=True, overwrite=True),
        RunError,
        "give one",
    ),
    Refusal("a run whose `request.json` is damaged", damaged, RunError, "is damaged"),
    Refusal("a run to be overwritten that holds the model", input_inside, RunError, "copy it elsewhere"),
    Refusal("a `report.json` of gohsp 0.1", first_edition, RunError, "run again"),
    Refusal("a damaged `report.json`", damaged_report, RunError, "cannot be read as JSON"),
)
