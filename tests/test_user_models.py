"""Models as people have them: frozen in parts, in half precision, tied, compiled, adapted, with their own outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gohsp
from conftest import TINY, randomise
from gohsp.config import from_mapping
from gohsp.errors import UnsupportedModelError

IMAGES = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FEW = from_mapping({"precision": "no", "calibration": {"images": 16, "holdout": 4}})


def vit(**arguments: Any) -> Any:
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**TINY, "mlp_ratio": 2, **arguments}), 0).eval()


def pruned(model: nn.Module, **options: Any) -> gohsp.Pruned:
    return gohsp.prune(model, IMAGES, "params=-25%", config=FEW, **options)


@pytest.fixture(scope="module")
def usual() -> gohsp.Pruned:
    """What becomes of the plain model."""
    return pruned(vit())


# Frozen, and of several data types


def test_what_was_frozen_is_frozen(usual: gohsp.Pruned, tmp_path: Path) -> None:
    model = vit()
    model.blocks.requires_grad_(False)
    model.patch_embed.requires_grad_(False)
    result = pruned(model)
    frozen = {name for name, parameter in result.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("blocks.", "patch_embed."))}
    assert result.kept == usual.kept
    gohsp.save(result.model, tmp_path, own=True)
    loaded = gohsp.load(tmp_path, into=copy.deepcopy(model))
    assert frozen == {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    healed = gohsp.heal(result.model, model, IMAGES, config=FEW)
    assert healed.curve
    assert frozen == {name for name, parameter in result.model.named_parameters() if not parameter.requires_grad}


class Mixed(nn.Module):
    """A backbone in half precision under a decoder that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.decoder = vit(num_classes=0).bfloat16(), nn.Linear(32, 3)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        weight = self.backbone.patch_embed.proj.weight
        return self.decoder(self.backbone(images.to(weight.dtype)).to(self.decoder.weight.dtype)) + self.shift


def test_each_part_keeps_its_data_type() -> None:
    small = pruned(Mixed().eval()).model
    types = {name.partition(".")[0]: parameter.dtype for name, parameter in small.named_parameters()}
    assert types == {"backbone": torch.bfloat16, "decoder": torch.float32}
    assert {parameter.dtype for parameter in small.backbone.parameters()} == {torch.bfloat16}
    assert small(IMAGES[:2]).dtype == torch.float32


# Tied


class Tied(nn.Module):
    """Two heads of one weight behind a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.first, self.second = vit(num_classes=0), nn.Linear(32, 5), nn.Linear(32, 5)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        x = self.backbone(images)
        return self.first(x) + self.second(x.relu())


def test_weights_tied_outside_of_blocks_stay_tied(tmp_path: Path) -> None:
    result = pruned(Tied().eval()).model
    gohsp.save(result, tmp_path)
    loaded = gohsp.load(tmp_path, into=Tied())
    for model in (result, loaded):
        assert model.second.weight is model.first.weight
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), result(IMAGES))
    model = Tied()
    model.second.weight = model.backbone.blocks[0].attn.proj.weight
    with pytest.raises(UnsupportedModelError, match=r"'second\.weight' is the same parameter as 'backbone\.blocks\.0"):
        pruned(model)


# Recomputing, dropping out: the same comes out


def _in_training(model: Any) -> Any:
    return model.train()


def _recomputing(model: Any) -> Any:
    model.set_grad_checkpointing(True)
    return model.train()


@pytest.mark.parametrize("change", [_in_training, _recomputing])
def test_a_model_amid_training_is_pruned_alike(change: Callable[[Any], Any], usual: gohsp.Pruned) -> None:
    model = change(vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5))
    result = pruned(model)
    assert result.kept == usual.kept
    with torch.no_grad():
        torch.testing.assert_close(result.model(IMAGES), usual.model(IMAGES))
    assert result.model.blocks[1].drop_path1.drop_prob == 0.5


def test_transformers_recomputation_makes_no_difference() -> None:
    library: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = library.ViTModel(library.ViTConfig(image_size=16, patch_size=8, **sizes)).train()
    expected = pruned(model)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True  # what the method of its class does, whose name has changed
    assert pruned(model).kept == expected.kept


# Adapted by peft


def test_adapters_of_peft_are_refused_until_they_are_merged(usual: gohsp.Pruned) -> None:
    peft: Any = pytest.importorskip("peft")
    adapted = peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(UnsupportedModelError, match=r"qkv' is an adapter \(LoRA\).*merge_and_unload\(\)"):
        pruned(adapted)
    assert pruned(adapted.merge_and_unload()).kept == usual.kept


# Outputs


@dataclass
class Found:
    """What a model of somebody's own returns."""

    logits: Tensor
    box: Tensor


@dataclass
class Boxes:
    boxes: Tensor


class Returning(nn.Module):
    def __init__(self, returns: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.vit, self.returns = vit(), returns

    def forward(self, images: Tensor) -> object:
        return self.returns(self.vit(images))


def test_outputs_that_are_dataclasses(usual: gohsp.Pruned) -> None:
    result = pruned(Returning(lambda x: Found(logits=x, box=x[:, :4])))
    assert result.fidelity.objective == "classification"  # the very tensor that a classifier inside returned
    assert {f"vit.{name}": of for name, of in usual.kept.items()} == result.kept
    boxes = Returning(lambda x: Boxes(boxes=x))
    with pytest.raises(UnsupportedModelError, match=r"returns a Boxes, in which no tensor is found; give an objective"):
        pruned(boxes)
    assert pruned(boxes, objective=lambda returned: returned.boxes).fidelity.objective == "features"
