"""Finding what can be pruned by walking a model, wherever its blocks are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp.errors import PlanError, UnsupportedModelError
from gohsp.models import compact, describe, input_size, plain_attention, working_copy
from gohsp.structure import AttentionWidths, count_macs, count_params, excluding, keep_all, keep_none

NAMES = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]


class Bare(nn.Module):
    """Blocks in a module of the user's own, called as ``order`` says; returns tokens."""

    def __init__(self, order: tuple[int, ...] = (0, 1), count: int = 2) -> None:
        super().__init__()
        self.patch, self.layers = nn.Conv2d(3, 32, 8, 8), nn.ModuleList(Block(32, 4) for _ in range(count))
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        for i in self.order:
            x = self.layers[i](x)
        return x


class Between(Bare):
    def forward(self, images: Tensor) -> Tensor:
        x = self.layers[0](self.patch(images).flatten(2).mT)
        return self.layers[1](x + 1)


class Wrapped(nn.Module):
    """A timm model in a user's module, with a neck and two heads."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, nn.Linear(32, 16)
        self.heads = nn.ModuleDict({"class": nn.Linear(16, 5), "box": nn.Linear(16, 4)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.neck(self.backbone.forward_features(images).mean(1))
        return {"logits": self.heads["class"](x), "box": self.heads["box"](x)}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, images: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), plain_attention(model), counter:
        copy.deepcopy(model).requires_grad_(False)(images[:1])
    return counter.get_total_flops() // 2


def narrowed_at(model: nn.Module, images: Tensor, gone: str) -> nn.Module:
    """The model without one of its sub-layers."""
    widths = describe(model, images).widths
    kept = {name: keep_none(of) if name == gone else keep_all(of) for name, of in widths.items()}
    return compact(model, kept, images).model


def test_a_vision_transformer_that_no_factory_made(images: Tensor) -> None:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5).eval()
    network = describe(model)
    assert list(network.widths) == NAMES
    assert (count_params(network), count_macs(network)) == (parameters(model), macs(model, images))
    small = narrowed_at(model, images, "blocks.1.mlp")
    assert count_params(describe(small)) == parameters(small) < parameters(model)


def test_a_timm_model_in_a_module_of_the_users_own(model: nn.Module, images: Tensor) -> None:
    wrapped = Wrapped(model).eval()
    network, alone = describe(wrapped), describe(model)
    assert list(network.widths) == [f"backbone.{name}" for name in NAMES]
    assert (count_params(network), count_macs(network)) == (parameters(wrapped), macs(wrapped, images))
    assert network.fixed_params == alone.fixed_params + parameters(wrapped) - parameters(model)
    small = narrowed_at(wrapped, images, "backbone.blocks.0.attn")
    assert isinstance(small, Wrapped)
    assert describe(small).widths["backbone.blocks.0.attn"] == AttentionWidths(heads=0, qk=0, vo=0)
    assert (count_params(describe(small)), count_macs(describe(small))) == (parameters(small), macs(small, images))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["backbone.blocks.0"], {"backbone.blocks.0.attn", "backbone.blocks.0.mlp"}),
        (["backbone.blocks.1.mlp"], {"backbone.blocks.1.mlp"}),
        (["backbone"], {f"backbone.{name}" for name in NAMES}),
        (["ffn"], {"backbone.blocks.0.mlp", "backbone.blocks.1.mlp"}),
    ],
)
def test_names_are_what_exclude_takes(exclude: list[str], left: set[str], model: nn.Module) -> None:
    network = excluding(describe(Wrapped(model)), exclude)
    assert {sub.name for sub in network.present if not sub.prunable and not sub.removable} == left
    with pytest.raises(PlanError, match=r"exclude names 'blocks\.0'.*backbone\.blocks\.0"):
        excluding(network, ["blocks.0"])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_sublayers_come_in_the_order_in_which_they_run(order: tuple[int, ...], images: Tensor) -> None:
    network = describe(Bare(order), images)
    assert list(network.blocks) == [f"layers.{i}" for i in order]
    assert {(sub.tokens, sub.readout.size) for sub in network.present} == {(4, 32)}


def test_a_block_that_does_not_run_stays_as_it_is(images: Tensor) -> None:
    model = Bare((0, 2), count=3).eval()
    network = describe(model, images)
    assert list(network.blocks) == ["layers.0", "layers.2"]
    assert count_params(network) == parameters(model)
    small = narrowed_at(model, images, "layers.2.mlp")
    assert torch.equal(small.layers[1].mlp.fc1.weight, model.layers[1].mlp.fc1.weight)
    with pytest.raises(UnsupportedModelError, match="none of the model's blocks takes part in its forward pass"):
        describe(Bare(()), images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Bare((0, 0)), r"block 'layers\.0' runs more than once for an image"),
        (Bare((0, 1, 0)), r"block 'layers\.0' runs more than once for an image"),
        (
            nn.Sequential(nn.Conv2d(3, 32, 8, 8), Block(32, 4)),
            r"block '1' is given \[1, 32, 2, 2\], not \[images, tokens",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(768, 5)),
            r"Sequential has no block that can be pruned; supported: .*timm",
        ),
        ("vit_tiny", r"a builtins\.str cannot be pruned; give a torch\.nn\.Module"),
    ],
    ids=["twice", "again", "maps", "none", "text"],
)
def test_what_cannot_be_pruned_is_said(model: Any, message: str, images: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        describe(model, images)


def test_the_same_block_under_two_names_is_refused(images: Tensor) -> None:
    model = Bare()
    model.layers[1] = model.layers[0]
    with pytest.raises(UnsupportedModelError, match=r"'layers\.1\..*' is the same parameter as 'layers\.0\."):
        describe(model, images)


@pytest.mark.parametrize(
    ("wrap", "inside"), [(torch.compile, "_orig_mod"), (nn.DataParallel, "module")], ids=["compile", "DataParallel"]
)
def test_wrappers_inside_are_refused_with_what_to_do(
    wrap: Callable[[nn.Module], nn.Module], inside: str, model: nn.Module, images: Tensor
) -> None:
    outer = Wrapped(model)
    outer.backbone = wrap(model)
    with pytest.raises(
        UnsupportedModelError, match=rf"'backbone' is a .*: model\.backbone = model\.backbone\.{inside}"
    ):
        describe(outer, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [True, False], ids=["float32 images", "no images"])
def test_a_model_of_another_precision(dtype: torch.dtype, given: bool, model: nn.Module, images: Tensor) -> None:
    expected = describe(model)
    other = copy.deepcopy(model).to(dtype)
    shown = images if given else None
    assert describe(other, shown) == expected
    assert {p.dtype for p in other.parameters()} == {dtype}
    copied = working_copy(other, shown)
    assert {p.dtype for p in copied.parameters()} == {torch.float32}


def test_a_working_copy_is_whole_and_ready(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    model = make_model("deit_tiny_distilled_patch16_224").train()
    model.set_distilled_training(True)
    model.blocks.requires_grad_(False)
    copied = working_copy(model)
    assert not copied.training
    assert all(p.requires_grad for p in copied.parameters())
    assert copied.train()(images).shape == (32, 5)
    assert model.training
    assert model.distilled_training
    assert not any(p.requires_grad for p in model.blocks.parameters())


@pytest.mark.parametrize(("size", "tokens"), [(16, 5), (32, 17)])
def test_images_tell_how_many_tokens_there_are(size: int, tokens: int, make_model: Callable[..., nn.Module]) -> None:
    model = make_model(dynamic_img_size=True)
    network = describe(model, torch.randn(3, 3, size, size))
    assert {sub.tokens for sub in network.present} == {sub.keys for sub in network.attentions} == {tokens}
    assert count_macs(network) == macs(model, torch.randn(1, 3, size, size))


def test_a_model_that_takes_another_size_wants_to_be_shown_an_image() -> None:
    class Fixed(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 9, 32))

        def forward(self, images: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](self.patch(images).flatten(2).mT + self.position))

    model = Fixed().eval()
    with pytest.raises(UnsupportedModelError, match=r"cannot compute an image of \[3, 224, 224\].*; give images"):
        describe(model)
    assert {sub.tokens for sub in describe(model, torch.randn(2, 3, 24, 24)).present} == {9}


def test_the_size_that_a_model_takes(make_model: Callable[..., nn.Module]) -> None:
    assert input_size(make_model(in_chans=1, img_size=(16, 32))) == (1, 16, 32)
    assert input_size(Wrapped(make_model())) == (3, 16, 16)
    assert input_size(Bare()) == (3, 224, 224)


def test_describing_leaves_a_model_as_it_was(model: nn.Module) -> None:
    model.train()
    model.blocks[1].eval()
    model.blocks[0].requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    before, state = [vars(module).copy() for module in model.modules()], copy.deepcopy(model.state_dict())
    describe(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert [vars(module) for module in model.modules()] == before  # no forward set, no hook left
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_recomputation_in_training_makes_no_difference(model: nn.Module) -> None:
    expected = describe(model)
    model.set_grad_checkpointing(True)
    assert describe(model) == expected


def test_frozen_and_unusual_parameters_count(images: Tensor) -> None:
    model = Bare().eval()
    model.register_parameter("unused", nn.Parameter(torch.zeros(7), requires_grad=False))
    network = describe(model, images)
    assert count_params(network) == parameters(model)
    assert network.fixed_params == 7 + parameters(model.patch)
