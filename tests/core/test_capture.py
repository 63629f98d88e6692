from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gohsp.core.capture import (
    Trunk,
    evaluating,
    named_module,
    observe_inputs,
    open_trunk,
    passed,
    read_by,
    require_finite,
    units,
    wanted,
)
from gohsp.core.projection import RepairSettings
from gohsp.core.reconstruction import reconstruct
from gohsp.errors import NonFiniteError, UnsupportedModelError
from gohsp.models import compact, describe, relative_difference
from gohsp.structure import AttentionWidths, FfnWidths, Network, Readout, absent, kept_widths
from toys import ffn


class Called(nn.Module):
    """A model that calls its blocks with more than the stream: what, a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layers = nn.Conv2d(3, 32, 8, 8), nn.ModuleList(Block(32, 4) for _ in range(2))
        self.register_buffer("mask", torch.randn(1, 1, 4, 4))

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"attn_mask": self.mask}

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        extra = self.extra(x)
        for layer in self.layers:
            x = layer(x, **extra)
        return x.mean(1)


class MaskedByImage(Called):
    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"attn_mask": (x @ x.mT)[:, None]}


class MaskForEachImage(Called):
    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"attn_mask": self.mask.repeat(len(x), 1, 1, 1)}


class Tables(nn.Module):
    """A block that is called with a pair of tables, as with those of rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(32, 4)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return self.block(x * tables[0] + tables[1])


class WithTables(Called):
    def __init__(self, *, by_image: bool) -> None:
        super().__init__()
        self.layers, self.by_image = nn.ModuleList(Tables() for _ in range(2)), by_image

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"tables": (torch.ones(1), x.mean(1, keepdim=True) if self.by_image else self.mask[0, 0, :, :1])}


def test_a_trunk_runs_as_the_model_does(trunk: Trunk, model: nn.Module, images: Tensor) -> None:
    assert trunk.blocks == ("blocks.0", "blocks.1")
    sent: list[Tensor] = []
    with torch.no_grad(), observe_inputs(model, {"norm": sent.append}):
        expected = model(images)
        x = trunk.enter(images)
        for i in range(len(trunk.blocks)):
            x = trunk.run(i, x)
        assert torch.equal(x, sent[0])
        head = model.norm(x)
        assert torch.equal(model.forward_head(head), expected)


def test_entering_ends_where_the_first_block_begins(trunk: Trunk, model: nn.Module, images: Tensor) -> None:
    ran: list[nn.Module] = []
    model.blocks[0].norm1.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        x = trunk.enter(images)
        assert ran == []
        assert torch.equal(x, model.norm_pre(model._pos_embed(model.patch_embed(images))))
    assert not model.blocks[0]._forward_pre_hooks


def test_inputs_are_what_modules_read_and_no_more_is_computed(
    trunk: Trunk, model: nn.Module, network: Network, entered: Tensor
) -> None:
    names = ["blocks.0.attn", "blocks.0.attn.proj", "blocks.0.mlp"]
    seen: dict[str, Tensor] = {}
    watch = {name: lambda x, name=name: seen.__setitem__(name, x) for name in names}
    with torch.no_grad():
        with observe_inputs(model, watch):
            trunk.run(0, entered)
        ran: list[nn.Module] = []
        model.blocks[0].mlp.fc1.register_forward_hook(lambda module, *_: ran.append(module))
        found = trunk.inputs(0, entered, names)
        assert ran == []
        assert len(found) == len(names)
        assert all(torch.equal(x, seen[name]) for x, name in zip(found, names, strict=True))
        read = read_by(model, network.attentions[0], seen["blocks.0.attn"], trunk.calls[0])
        assert torch.equal(read, seen["blocks.0.attn.proj"])


def test_a_copy_has_the_same_trunk(trunk: Trunk, model: nn.Module, entered: Tensor) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].mlp.fc2.bias.add_(1.0)
        assert trunk.of(other).block(0) is other.blocks[0]
        torch.testing.assert_close(trunk.of(other).run(0, entered), trunk.run(0, entered) + 1)


def test_passes_may_be_in_lower_precision(trunk: Trunk, entered: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        return trunk.run(0, x)

    with torch.no_grad():
        full, half = passed(run, entered, torch.float32), passed(run, entered, torch.bfloat16)
    assert half.dtype == torch.float32
    assert torch.equal(full, run(entered))
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


# Blocks that are called with more


def test_a_block_is_called_as_its_model_calls_it(images: Tensor) -> None:
    model = Called().eval()
    network = describe(model, images)
    trunk = open_trunk(model, network, images[:3])
    assert [set(call.kwargs) for call in trunk.calls] == [{"attn_mask"}] * 2
    with torch.no_grad():
        x = trunk.enter(images)
        for i in range(2):
            x = trunk.run(i, x)
        assert torch.equal(x.mean(1), model(images))
        plain = model.layers[0](trunk.enter(images))
        assert not torch.allclose(trunk.run(0, trunk.enter(images)), plain)


def test_what_a_block_is_called_with_is_seen_by_the_repair(images: Tensor) -> None:
    """Nothing is cut: a repair that let go of the mask would change the model."""
    model = Called().eval()
    network = describe(model, images)
    trunk, other = open_trunk(model, network, images[:2]), copy.deepcopy(model)
    with torch.no_grad():
        entered = [trunk.enter(images)]
    reconstruct(trunk, other, network, network.widths, entered, None, RepairSettings())
    assert relative_difference(model, other, images) < 1e-4
    widths = network.widths | {
        "layers.0.attn": AttentionWidths(heads=3, qk=3, vo=5),
        "layers.1.attn": absent(network.widths["layers.1.attn"]),
        "layers.1.mlp": FfnWidths(units=30),
    }
    kept = reconstruct(trunk, other, network, widths, entered, None, RepairSettings())
    small = compact(other, kept, images).model
    assert describe(small, images).widths == kept_widths(kept) == widths
    assert relative_difference(other, small, images) < 1e-5


@pytest.mark.parametrize("model", [MaskedByImage(), MaskForEachImage()], ids=["by image", "for each image"])
@pytest.mark.parametrize("count", [1, 3])
def test_tensors_that_depend_on_the_images_are_refused(model: nn.Module, count: int, images: Tensor) -> None:
    network = describe(model.eval(), images)
    with pytest.raises(UnsupportedModelError, match=r"block 'layers\.0' is called with tensors besides the stream"):
        open_trunk(model, network, images[:count])


def test_tensors_may_come_in_pairs(images: Tensor) -> None:
    network = describe(Called(), images)  # its names are all that is asked of it
    trunk = open_trunk(WithTables(by_image=False), network, images[:2])
    assert trunk.enter(images).shape == trunk.run(0, trunk.enter(images)).shape
    with pytest.raises(UnsupportedModelError, match=r"block 'layers\.0' is called with tensors besides the stream"):
        open_trunk(WithTables(by_image=True), network, images[:2])


# Refusals


class Merged(nn.Module):
    """Something between its blocks: two tokens become one, of twice the width; and, if asked, what the image shows."""

    def __init__(self, *, peeks: bool = False) -> None:
        super().__init__()
        self.patch, self.first, self.second = nn.Conv2d(3, 16, 8, 8), Block(16, 2), Block(16, 2)
        self.between, self.third, self.peeks = nn.LayerNorm(32), Block(32, 4), peeks

    def forward(self, images: Tensor) -> Tensor:
        x = entered = self.patch(images).flatten(2).mT
        x = self.second(self.first(x)).unflatten(1, (-1, 2)).flatten(2)
        if self.peeks:
            x = x + entered.unflatten(1, (-1, 2)).flatten(2)
        return self.third(self.between(x)).mean(1)


def test_what_stands_between_blocks_is_crossed_by_the_models_own_forward(images: Tensor) -> None:
    model = Merged().eval()
    network = describe(model, images)
    assert [sub.readout.size for sub in network.present] == [16] * 4 + [32] * 2
    trunk = open_trunk(model, network, images)
    assert trunk.crossings == {2}
    with torch.no_grad():
        x = trunk.enter(images)
        for i in range(3):
            x = trunk.run(i, trunk.onto(i, x))
        torch.testing.assert_close(x.mean(1), model(images), rtol=0, atol=0)
    stream = torch.randn(5, 4, 16, requires_grad=True)
    sent = trunk.onto(2, stream)
    torch.testing.assert_close(sent, model.between(stream.unflatten(1, (-1, 2)).flatten(2)))
    sent.square().sum().backward()  # blocks before and after it can be tuned together
    assert stream.grad is not None
    assert trunk.onto(1, stream) is stream


def test_reconstruction_goes_on_behind_what_stands_between_blocks(images: Tensor) -> None:
    model = Merged().eval()
    network = describe(model, images)
    widths: dict[str, Any] = {
        name: AttentionWidths(heads=of.heads, qk=5, vo=6) if isinstance(of, AttentionWidths) else FfnWidths(units=40)
        for name, of in network.widths.items()
    }
    trunk, repaired = open_trunk(model, network, images), copy.deepcopy(model)
    with torch.no_grad():
        kept = reconstruct(trunk, repaired, network, widths, [trunk.enter(images)], None, RepairSettings())
    small = compact(repaired, kept, images).model
    crude = compact(model, kept, images).model
    assert relative_difference(model, small, images) < 0.7 * relative_difference(model, crude, images)


def test_a_block_that_reads_more_than_the_stream_before_it_is_refused(images: Tensor) -> None:
    model = Merged(peeks=True).eval()
    with pytest.raises(UnsupportedModelError, match=r"what block 'third' reads does not follow from what the block"):
        open_trunk(model, describe(model, images), images)


def test_a_model_that_was_not_described_is_named(model: nn.Module, network: Network, images: Tensor) -> None:
    wrapped, sub = nn.DataParallel(model), network.sublayers[0]
    message = r"not that of the model .*model\.module of DataParallel"
    with pytest.raises(UnsupportedModelError, match=message):
        units(wrapped, sub.readout.columns, 4)
    with pytest.raises(UnsupportedModelError, match=message):
        named_module(wrapped, sub.readout.module)
    with pytest.raises(UnsupportedModelError, match=message), observe_inputs(wrapped, {sub.name: print}):
        pass
    with pytest.raises(UnsupportedModelError, match=message):
        open_trunk(wrapped, network, images[:2])


# What is left behind


def test_modes_and_hooks_are_put_back_whatever_happens(model: nn.Module, images: Tensor) -> None:
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]

    def fail(_x: Tensor) -> None:
        raise KeyError("a model's own fault")

    def run() -> None:
        with evaluating(model), observe_inputs(model, {"blocks.0.mlp": fail}):
            assert not any(module.training for module in model.modules())
            model(images)

    with pytest.raises(KeyError):
        run()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_opening_leaves_a_model_as_it_was(model: nn.Module, network: Network, images: Tensor) -> None:
    model.train()
    before = [vars(module).copy() for module in model.modules()]
    trunk = open_trunk(model, network, images[:2])
    assert [vars(module) for module in model.modules()] == before
    assert all(call.args == () and call.kwargs == {} for call in trunk.calls)


def test_no_except_clause_of_a_model_swallows_the_end_of_a_pass(images: Tensor) -> None:
    class Careful(Called):
        def forward(self, images: Tensor) -> Tensor:
            try:
                return super().forward(images)
            except Exception:  # as of a model that falls back on something
                pytest.fail("the model went on")

    model = Careful().eval()
    trunk = open_trunk(model, describe(model, images), images[:2])
    with torch.no_grad():
        assert trunk.enter(images).shape == (32, 4, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("cut", "whose"), [(False, "in the model as given"), (True, "gohsp's doing")])
def test_whose_doing_a_number_is_that_is_none(value: float, cut: bool, whose: str) -> None:
    values = torch.ones(3, 4)
    require_finite("the stream", values, cut=cut)
    values[1, 2] = value
    with pytest.raises(NonFiniteError, match=rf"the stream holds NaN, infinite or huge .*{whose}"):
        require_finite("the stream", values, cut=cut)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("of_sum", [True, False])
def test_what_a_readout_should_write_leads_through_the_norm_behind_it(of_sum: bool, affine: bool) -> None:
    norm, out = nn.LayerNorm(8, elementwise_affine=affine), nn.Linear(6, 8)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    gain = norm.weight.detach() if affine else torch.ones(8)
    readout = Readout(module="out", bias="out.bias", gain="norm.weight" if affine else None, size=8)
    sub = ffn("block", 6, dim=8, readout=replace(readout, norm="norm", norm_of_sum=of_sum))
    stream, read = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    model = nn.ModuleDict({"norm": norm, "out": out})
    with torch.no_grad():
        present = out(read)
        deviation = present.std(-1, correction=0, keepdim=True)
        near, far = present + 0.2 * deviation * torch.randn(2, 3, 8), 9 * torch.randn(2, 3, 8)
        if of_sum:  # exact, however far
            asked = wanted(model, sub, stream, read, norm(stream + far)) / gain
            torch.testing.assert_close(norm(stream + asked), norm(stream + far), rtol=1e-3, atol=1e-3)
            return
        asked = wanted(model, sub, stream, read, stream + norm(near)) / gain
        torch.testing.assert_close(norm(asked), norm(near), rtol=1e-3, atol=1e-3)
        moved = wanted(model, sub, stream, read, stream + far) / gain - present
        torch.testing.assert_close(moved.abs().amax(-1, keepdim=True), deviation, rtol=1e-2, atol=1e-3)
