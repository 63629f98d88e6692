"""Write the table of ``docs/families.md``: the contract of ``test_families.py`` run, its results kept and shown.

    python tests/models/page.py            # runs the contract on the versions that are installed; make families
    python tests/models/page.py --write    # writes the table from what was kept alone

Versions that a family passed on are kept in ``results.json`` beside those of earlier runs; delete it to begin anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from zoo import ZOO, images_for, made

from gohsp.models import blocks_of, describe
from gohsp.models.families import class_name
from gohsp.structure import Attention

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- made by tests/models/page.py -->\n", "<!-- end -->"
PACKAGES = {"open_clip": "open-clip-torch", "vit_pytorch": "vit-pytorch", "segment_anything": "segment-anything"}
"""What libraries are called where they are not called by their own names."""

KINDS = {"head": "heads", "qk": "query/key width", "vo": "value width", "ffn": "hidden units"}
ABSENT = ("is not installed", "of another version of its library")
"""Reasons by which a test was skipped that say that the family was not there."""

Results = Mapping[str, Mapping[str, Any]]


class Recorder:
    """A plugin of pytest's that notes how the tests of each family ended."""

    def __init__(self) -> None:
        self.outcomes: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each phase of each test."""
        given = report.nodeid.partition("[")[2].removesuffix("]")
        names = [name for name in ZOO if given == name or given.startswith(f"{name}-")]
        if not names:
            return
        ended = self.outcomes.setdefault(max(names, key=len), set())
        if report.failed:
            ended.add("failed")
        elif report.skipped and any(reason in str(report.longrepr) for reason in ABSENT):
            ended.add("absent")
        elif report.passed and report.when == "call":
            ended.add("passed")


def facts(name: str) -> dict[str, Any]:
    """What the table tells of a family, read off its model."""
    model = made(name)
    network = describe(model, images_for(name))
    inside = {class_name(block).rpartition(".")[2] for block, _ in blocks_of(model).values()}
    foreign = type(model).__module__.partition(".")[0] == library_of(name)
    trimmed = re.sub(r"(?<=\w)(Model|For[A-Z]\w+)?(WithProjection)?$", "", type(model).__name__)
    return {
        "model": trimmed if foreign else None,
        "block": " and ".join(sorted(inside)) if inside != {"ModuleList"} else None,
        "cuts": [kind for kind in KINDS if any(kind in sub.prunable for sub in network.present)],
        "removable": [
            label
            for label, of in (("attention", True), ("FFN", False))
            if any(sub.removable and isinstance(sub, Attention) == of for sub in network.present)
        ],
        "whole": not ZOO[name].same,
    }


def library_of(name: str) -> str:
    """The library of one of the zoo's families."""
    return name.partition(" ")[0]


def version_of(library: str) -> str:
    """The version of a library that is installed."""
    return importlib.metadata.version(PACKAGES.get(library, library)).partition("+")[0]


def ran(before: Results) -> tuple[dict[str, Any], int]:
    """The results with those of a run on the installed versions, and pytest's exit status."""
    recorder = Recorder()
    status = pytest.main([str(HERE / "test_families.py"), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    results: dict[str, Any] = {}
    for name in ZOO:
        known, ended = dict(before.get(name, {"versions": []})), recorder.outcomes.get(name, set())
        if ended == {"passed"}:
            known = facts(name) | {"versions": sorted({*known["versions"], version_of(library_of(name))}, key=order)}
        elif "failed" in ended:
            known["versions"] = [version for version in known["versions"] if version != version_of(library_of(name))]
        results[name] = known
    return results, int(status)


def order(version: str) -> list[int]:
    """Sorts versions by their numbers."""
    return [int(number) for number in re.findall(r"\d+", version)]


def table(results: Results) -> str:
    """The table, a line for all models of a library of which the same may be cut."""
    run = {name: of for name, of in results.items() if of["versions"]}
    rows: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for name, of in run.items():
        key = (library_of(name), tuple(of["cuts"]), tuple(of["removable"]), tuple(of["versions"]))
        rows.setdefault(key, {}).setdefault(shown(name, run), []).append(of["whole"])
    lines = ["| library | models | stays as it is | may go altogether | checked |", "| --- | --- | --- | --- | --- |"]
    for (library, cuts, removable, versions), models in rows.items():
        stays = ", ".join(label for kind, label in KINDS.items() if kind not in cuts)
        partly = [model for model, whole in models.items() if not any(whole)]
        listed = ", ".join(f"{model}*" if model in partly else model for model in models)
        lines.append(f"| {library} | {listed} | {stays} | {', '.join(removable)} | {', '.join(versions)} |")
    left = ", ".join(name for name, of in results.items() if not of["versions"])
    return (
        "\n".join(lines) + "\n" + (f"\nIn the suite, but with no package to run on lately: {left}.\n" if left else "")
    )


def shown(name: str, results: Results) -> str:
    """A family's model, with its class of blocks where its library has several in models of that name."""
    of = results[name]
    beside = [results[other] for other in results if library_of(other) == library_of(name)]
    alike = {other["block"] for other in beside if other["model"] == of["model"]}
    if of["model"] is None:
        return f"`{of['block']}`"
    return f"`{of['model']}` of `{of['block']}`" if len(alike) > 1 else f"`{of['model']}`"


def page_with(text: str, results: Results) -> str:
    """The page's text with its table anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table(results) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    """Run the contract unless told not to, and write the page."""
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    status = 0
    if sys.argv[1:] != ["--write"]:
        results, status = ran(results)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page_with(PAGE.read_text(), results))
    sys.exit(status)


if __name__ == "__main__":
    main()
