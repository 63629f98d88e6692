"""``gohsp`` and ``python -m gohsp``: the command line, or what to install for it."""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point; returns the exit status."""
    try:
        from gohsp.cli import main as command_line
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: the command line needs {error.name}: pip install 'gohsp[cli]'\n")
        return 1
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
