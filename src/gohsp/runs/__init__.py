"""Runs: pruning from a data source into a folder, with a report, that an interruption does not end."""

from gohsp.errors import require_packages

# Before the work: settings are written at its beginning, and the report at its end.
require_packages("a run", "cli", "filelock", "jinja2", "matplotlib", "timm", "tomli_w")

from gohsp.runs.run import RunResult, run  # noqa: E402

__all__ = ["RunResult", "run"]
