"""Uploads that cannot be, and what the hub does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm

import gohsp
from gohsp.errors import CheckpointError, ConfigError, StorageError
from refusals import Refusal

TITLE = "The hub"

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}


def tiny() -> Any:
    return timm.create_model("vit_tiny_patch16_224", **TINY)


def pushed(repository: Any = "me/small", **options: Any) -> Callable[[Path], object]:
    return lambda _: gohsp.push_to_hub(tiny(), repository, **options)


def without_network(act: Callable[[Path], object]) -> Callable[[Path], object]:
    def offline(folder: Path) -> None:
        constants = "huggingface_hub.constants"
        with patch(f"{constants}.HF_HUB_OFFLINE", True), patch(f"{constants}.HF_HUB_CACHE", str(folder)):
            act(folder)

    return offline


def revision_of_a_folder(folder: Path) -> None:
    gohsp.save(tiny(), folder / "model")
    gohsp.load(folder / "model", revision="v1")


CASES = (
    Refusal("a name of no owner to upload to", pushed("small"), ConfigError, "repository must be OWNER/NAME"),
    Refusal("an address to upload to", pushed("https://huggingface.co/me/small"), ConfigError, "such as 'me/small'"),
    Refusal("a licence in words", pushed(license="Apache License 2.0"), ConfigError, "'apache-2.0', 'mit' or 'other'"),
    Refusal("a licence that would end a card's front matter", pushed(license="mit\n---"), ConfigError, "'mit\\n---'"),
    Refusal("a base model that is no repository", pushed(base_model="the one of timm"), ConfigError,
            "base_model must be OWNER/NAME"),
    Refusal("a card and what to put into one", pushed(card="# Mine", license="mit"), ConfigError, "leave it out"),
    Refusal("a folder of others to upload", lambda folder: gohsp.push_to_hub(folder, "me/small"), CheckpointError,
            "holds no config.json"),
    Refusal("an upload without a network", without_network(pushed()), StorageError, "cannot be written on the hub"),
    Refusal("a revision of a local folder", revision_of_a_folder, CheckpointError, "leave it out"),
    Refusal("a revision of a name of timm's", lambda _: gohsp.open_model("vit_tiny_patch16_224", revision="v1"),
            CheckpointError, "revision and token are for OWNER/NAME"),
    Refusal("a revision of a hub's repository without asking for its weights",
            lambda _: gohsp.open_model("me/small", revision="v1"), CheckpointError, "with its pretrained weights"),
    Refusal("a name that is no folder and none of the hub's", lambda _: gohsp.load("smal"), CheckpointError,
            "there is no folder 'smal'"),
    Refusal("a hub's revision that is not there", without_network(lambda _: gohsp.load("me/small", revision="v9")),
            CheckpointError, "at revision 'v9'"),
)  # fmt: skip
