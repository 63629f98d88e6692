"""Tiny random models that every test module shares, and the optional assets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from gohsp.core.capture import Trunk, open_trunk
from gohsp.core.moments import SublayerMoments, collect_moments
from gohsp.core.objective import Objective, classification
from gohsp.models import describe
from gohsp.structure import Network

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much the harnesses of ``tests/robustness`` try; by default a sample."""
    group = parser.getgroup("robustness")
    group.addoption("--mutations", type=int, default=200, help="spoilt model folders (in full: 20000)")
    group.addoption("--mutation", type=int, help="the number of one spoilt model folder, which alone is tried")
    group.addoption("--kills", type=int, default=2, help="runs killed at random, and at renames (in full: 100)")
    group.addoption("--damages", type=int, default=5, help="damaged files of runs (in full: 200)")


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter, biases, norms and LayerScale too, a value that matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
            elif ("norm" in name and name.endswith("weight")) or name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the page of a report: to draw them takes longer than a tiny run, or than what a page says in words."""
    monkeypatch.setattr("gohsp.report.html._picture", lambda *_, **__: "")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """``make_model(architecture, seed=0, **arguments)``: a tiny timm model with random weights, in eval mode."""

    def make(architecture: str = "vit_tiny_patch16_224", *, seed: int = 0, **arguments: Any) -> nn.Module:
        return randomise(timm.create_model(architecture, **{**TINY, **arguments}), seed).eval()

    return make


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> nn.Module:
    """A plain tiny ViT: 2 blocks of 4 heads of 8 dimensions, 64 hidden units, 5 classes, 5 tokens."""
    return make_model(mlp_ratio=2)


@pytest.fixture
def network(model: nn.Module) -> Network:
    return describe(model)


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def objective() -> Objective:
    return classification()


@pytest.fixture
def moments(model: nn.Module, network: Network, images: Tensor) -> dict[str, SublayerMoments]:
    return collect_moments(model, network, [images])


@pytest.fixture
def trunk(model: nn.Module, network: Network, images: Tensor) -> Trunk:
    return open_trunk(model, network, images[:2])


@pytest.fixture
def entered(trunk: Trunk, images: Tensor) -> Tensor:
    """What the images send into the first block of ``model``, ``[32, 5, 32]``."""
    with torch.no_grad():
        return trunk.enter(images)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the DeiT-Tiny checkpoint and data sets; skips where it is absent."""
    folder = Path(os.environ.get("GOHSP_ASSETS", Path(__file__).parents[1] / ".." / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no model and data files at {folder}; set GOHSP_ASSETS")
    return folder
