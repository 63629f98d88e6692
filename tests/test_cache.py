from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from gohsp import cache


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOHSP_CACHE", str(tmp_path / "cache"))


def test_what_was_stored_comes_back_under_its_key_alone() -> None:
    cache.store("curves", "k", [{"a": [1, 2.5]}])
    assert cache.load("curves", "k") == [{"a": [1, 2.5]}]
    assert cache.load("curves", "other") is None
    assert cache.load("times", "k") is None


def test_the_key_sees_values_shapes_types_and_settings() -> None:
    x = torch.arange(6.0)
    base = cache.key_of([x], {"a": 1, "b": 2})
    assert base == cache.key_of([x.clone()], {"b": 2, "a": 1})
    others = [
        cache.key_of([x + 1], {"a": 1, "b": 2}),
        cache.key_of([x.view(2, 3)], {"a": 1, "b": 2}),
        cache.key_of([x.view(torch.int32)], {"a": 1, "b": 2}),
        cache.key_of([x], {"a": 1, "b": 3}),
        cache.key_of([x.view(2, 3).T.contiguous()], {"a": 1, "b": 2}),
    ]
    assert len({base, *others}) == 6
    assert cache.key_of([x.view(2, 3).T], 0) == cache.key_of([x.view(2, 3).T.contiguous()], 0)
    assert cache.key_of([x.bfloat16()], 0) != base


@pytest.mark.parametrize("damage", ["", "{half", "2", "1 "])
def test_a_damaged_file_is_said_counts_as_none_and_is_replaced(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache.store("curves", "k", 1)
    next(cache.folder().iterdir()).write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert cache.load("curves", "k") is None
    assert "is damaged" in caplog.text
    cache.store("curves", "k", 3)
    assert cache.load("curves", "k") == 3
    assert len(list(cache.folder().iterdir())) == 1


def test_a_folder_that_cannot_be_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOHSP_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        cache.store("curves", "k", 1)
    assert "set GOHSP_CACHE" in caplog.text


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GOHSP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache.load("curves", "k") is None
    cache.store("curves", "k", 1)
    assert "set GOHSP_CACHE" in caplog.text


def test_the_users_cache_folder_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GOHSP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "gohsp"
