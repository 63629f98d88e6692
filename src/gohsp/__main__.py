"""``gohsp`` and ``python -m gohsp``: the command line, or what to install for it."""

from __future__ import annotations

import sys

from gohsp.errors import MissingPackageError, require_packages


def main() -> int:
    """Entry point; returns the exit status."""
    try:
        require_packages("the command line", "cli", "huggingface_hub", "rich", "tyro")
        from gohsp.cli import main as command_line
    except MissingPackageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
