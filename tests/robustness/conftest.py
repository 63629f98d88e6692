"""Folders and runs that the harnesses spoil, kill and damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import gohsp
from conftest import randomise
from gohsp.structure import AttentionKept, FfnKept, keep_none
from robustness.child import Home
from robustness.runs import SETTINGS, Job, Whole, carry_out, write_images

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints past the capture of output."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return show


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid model folders: dense, pruned to ``qk != vo``, with sub-layers gone, distilled, with a gated FFN."""
    folder = tmp_path_factory.mktemp("models")
    attention = AttentionKept(heads=(0, 2), qk=((0, 1, 2, 3),) * 2, vo=(tuple(range(6)),) * 2)
    ffn = FfnKept(units=tuple(range(24)))
    whole = {"blocks.0.attn": attention, "blocks.0.mlp": ffn, "blocks.1.attn": attention, "blocks.1.mlp": ffn}
    gone = {name: keep_none(whole[name].widths) for name in ("blocks.0.mlp", "blocks.1.attn")}
    cuts = {"pruned": whole, "removed": {**whole, **gone}}
    for name, architecture, arguments in (
        ("dense", "vit_tiny_patch16_224", {}),
        ("pruned", "vit_tiny_patch16_224", {}),
        ("removed", "vit_tiny_patch16_224", {}),
        ("distilled", "deit_tiny_distilled_patch16_224", {}),
        ("gated", "vit_giant_patch14_dinov2", {"mlp_ratio": 3.0}),
    ):
        model = randomise(timm.create_model(architecture, **{**SMALL, **arguments}), seed=0).eval()
        if name in cuts:
            model = gohsp.compact(model, cuts[name], torch.randn(4, 1, 8, 8)).model
        gohsp.save(model, folder / name, kept=cuts.get(name))
    return folder


@pytest.fixture(scope="session")
def job(model_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A small run with an ADMM stage and two epochs of fine-tuning."""
    folder = tmp_path_factory.mktemp("job")
    write_images(folder / "images")
    (folder / "settings.toml").write_text(SETTINGS)
    return Job(model_folders / "dense", folder / "images", folder / "settings.toml")


@pytest.fixture(scope="session")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """That run, once carried out without interruption."""
    return carry_out(job, Home(tmp_path_factory.mktemp("whole")))
