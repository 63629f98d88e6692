"""The recipe for int8 in PyTorch: torchao's on a pruned model, as the page on deploying has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gohsp
from gohsp.benchmark import bytes_of
from gohsp.errors import UnsupportedModelError
from gohsp.structure import AttentionKept, FfnKept

torchao: Any = pytest.importorskip("torchao.quantization")
CONFIGS = {"weights": torchao.Int8WeightOnlyConfig, "dynamic": torchao.Int8DynamicActivationInt8WeightConfig}


@pytest.fixture(scope="module")
def small(make_model: Any) -> nn.Module:
    """Odd widths, and queries and keys narrower than values."""
    model = make_model(mlp_ratio=2)
    kept = {
        "blocks.0.attn": AttentionKept(heads=(0, 1, 3), qk=((0, 2, 5),) * 3, vo=((0, 1, 2, 4, 7),) * 3),
        "blocks.0.mlp": FfnKept(units=tuple(range(0, 58, 2))),
    }
    return gohsp.compact(
        model, {**gohsp.structure.keep_everything(gohsp.describe(model)), **kept}, torch.randn(2, 3, 16, 16)
    ).model


@pytest.mark.parametrize("how", CONFIGS)
def test_a_pruned_model_is_quantised_by_torchao(how: str, small: nn.Module, tmp_path: Path):
    quantised = copy.deepcopy(small)
    torchao.quantize_(quantised, CONFIGS[how]())
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = small(images), quantised(images)
    assert 1e-4 < float((theirs - ours).norm() / ours.norm()) < 0.05
    # Norms and biases stay, and so does what makes patches, which is no linear map.
    assert sum(map(bytes_of, quantised.blocks.parameters())) < 0.5 * sum(map(bytes_of, small.blocks.parameters()))  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match="Prune and save first, and quantise or shard what is loaded"):
        gohsp.save(quantised, tmp_path / "small")
    assert not list(tmp_path.iterdir())
