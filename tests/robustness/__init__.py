"""Hostile model folders, killed runs and damaged files: a sample in every test run, the rest by an option.

``--mutations 20000`` for model folders, ``--kills 100`` for killed runs, ``--damages 200`` for damaged files.
"""
