"""Write ``docs/errors.md``: every case run, its error and message. ``make errors`` calls this."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from refusals import Refusal, all_refusals, message_of

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
HEAD = """# Errors

What gohsp refuses, by topic: what was given, the kind of error and what it says. All are kinds of `gohsp.GohspError`.
The tests in [`tests/refusals`](../tests/refusals) raise each of them; `make errors` writes this page from them.
"""


def row(refusal: Refusal) -> str:
    """The table's line of a case, run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        message = message_of(refusal, Path(folder))
    cells = (refusal.given, f"`{refusal.error.__name__}`", message)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Write the page."""
    parts = [HEAD]
    for title, cases in all_refusals().items():
        parts.append(f"## {title}\n\n| given | error | it says |\n| --- | --- | --- |")
        parts[-1] += "\n" + "\n".join(row(case) for case in cases) + "\n"
    PAGE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
