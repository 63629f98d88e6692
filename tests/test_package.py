"""The public names, and what importing the package costs."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys

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
    listed = {n for n, v in vars(gohsp).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert listed == set(gohsp.__all__) - {"admm"}
    assert gohsp.__version__ == importlib.metadata.version("gohsp")


def test_importing_leaves_optional_packages_alone():
    script = (
        "import sys, gohsp, gohsp.cli; sys.exit(' '.join({'datasets', 'webdataset', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stderr.strip() == ""
