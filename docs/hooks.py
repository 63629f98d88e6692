"""What the site makes of pages and docstrings that read well where they stand."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Leave the words of links that lead out of ``docs/``: those files are in the repository, not on the site."""
    out = re.escape("../" * (page.file.src_uri.count("/") + 1))
    return re.sub(rf"\[([^\]]+)\]\({out}[^)]*\)", r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leave the code of Sphinx's roles (``:func:`x```) and take away their kind."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)
