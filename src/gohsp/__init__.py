"""gohsp."""
