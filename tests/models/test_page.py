"""The table of what works is that of the suite's last results, and these are of the families that there are."""

from __future__ import annotations

import json

import page
from zoo import ZOO


def test_the_table_is_up_to_date() -> None:
    results = json.loads(page.RESULTS.read_text())
    text = page.PAGE.read_text()
    assert page.page_with(text, results) == text, "run: make families"
    assert list(results) == list(ZOO), "run: make families"
    for name, of in results.items():
        assert {*page.KINDS} - {*of["cuts"]} == ZOO[name].held if of["versions"] else True
        assert of["whole"] is not ZOO[name].same if of["versions"] else True
