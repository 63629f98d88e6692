"""The public names, and what importing the package costs."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gohsp


@pytest.mark.parametrize("name", gohsp.__all__)
def test_public_names_exist_and_say_what_they_are(name: str):
    value = getattr(gohsp, name)
    text = inspect.getdoc(value)
    assert text
    assert not text.startswith(f"{name}(")  # the text that dataclass puts where there is none


def test_all_public_names_are_listed_in_order():
    assert gohsp.__all__ == sorted(gohsp.__all__)
    assert set(gohsp.__all__) <= set(dir(gohsp))
    assert gohsp.__version__ == importlib.metadata.version("gohsp")


def test_a_public_name_is_listed_before_it_is_used():
    assert run("import gohsp; print(sorted(set(gohsp.__all__) - set(dir(gohsp))))") == "[]"


def test_what_type_checkers_see_is_what_there_is():
    """The imports for type checkers, the table of homes and ``__all__`` name the same."""
    given = [name for names in gohsp._HOMES.values() for name in names]
    assert sorted(given) == gohsp.__all__
    source = inspect.getsource(gohsp)
    checked = source[source.index("if TYPE_CHECKING:") : source.index("_HOMES = ")]
    assert all(f" {name}" in checked for name in gohsp.__all__)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'gohsp' has no attribute 'prunes'"):
        gohsp.prunes  # noqa: B018


def run(script: str, *arguments: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OPTIONAL = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "rich",
    "sklearn",
    "timm",
    "tomli_w",
    "torchvision",
    "transformers",
    "tyro",
}
FIRST_USES = {
    "the package": "import gohsp",
    "settings": "import gohsp.config; gohsp.config.from_mapping({'seed': 3})",
    "models": "gohsp.load; gohsp.apply; gohsp.save",
    "pruning": "gohsp.prune; gohsp.measure_curves; gohsp.admm; gohsp.Config()",
    "the command line": "import gohsp.cli",
}
"""In an order in which each imports more than the one before."""


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """What one process has imported of PyTorch and the extras by each of the first uses."""
    watched = OPTIONAL | {"torch"}
    told = f"print(sorted({watched} & set(sys.modules)))"
    lines = run("\n".join(["import sys", *(f"{use}\n{told}" for use in FIRST_USES.values())])).splitlines()
    return {name: set(ast.literal_eval(line)) for name, line in zip(FIRST_USES, lines, strict=True)}


@pytest.mark.parametrize("use", list(FIRST_USES)[:-1])
def test_importing_leaves_alone_what_only_runs_and_reports_need(use: str, imported: dict[str, set[str]]):
    assert imported[use] <= {"torch"}


def test_importing_alone_takes_no_torch(imported: dict[str, set[str]]):
    assert imported["the package"] == set()


def test_the_command_line_leaves_data_sets_alone(imported: dict[str, set[str]]):
    assert not {"accelerate", "datasets", "sklearn", "timm", "transformers"} & imported["the command line"]


BLOCKED = f"import sys\nfor name in {sorted(OPTIONAL)}: sys.modules[name] = None\n"


THREE_LINES = Path(__file__).parent / "wheel" / "three_lines.py"


def test_three_lines_need_the_core_dependencies_alone_and_what_needs_more_names_its_extra(tmp_path: Path):
    """``make wheel`` runs the same lines in a bare environment, and loads in another process."""
    script = f"""
import gohsp, runpy
print(runpy.run_path({str(THREE_LINES)!r}, run_name="__main__")["params"])
for act in (lambda: gohsp.run, lambda: gohsp.push_to_hub("small", "me/small"), lambda: gohsp.load("me/small")):
    try:
        act()
    except gohsp.GohspError as error:
        print(error)
"""
    *_, params, runs, push, load = run(BLOCKED + script, "prune", str(tmp_path)).splitlines()
    assert int(params) == json.loads((tmp_path / "config.json").read_text())["params"]
    needed = [told.partition(": pip install ")[2] for told in (runs, push, load)]
    assert needed == ["'gohsp[cli]'", "'gohsp[hub]'", "'gohsp[hub]'"]


def test_the_command_line_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + "from gohsp.__main__ import main; sys.exit(main())"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'gohsp[cli]'" in done.stderr
