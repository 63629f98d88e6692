"""Runs: pruning from a data source into a folder, with a report, that an interruption does not end."""

from gohsp.runs.run import RunResult, run

__all__ = ["RunResult", "run"]
