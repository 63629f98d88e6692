from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gohsp.core import reconstruction, surgery
from gohsp.core.capture import Trunk, observe_inputs, open_trunk
from gohsp.core.fisher import TokenWeights
from gohsp.core.moments import collect_moments
from gohsp.core.projection import HeadScores, RepairSettings, constrained, on_support, project, select
from gohsp.core.reconstruction import only, reconstruct
from gohsp.core.ridge import cross_validated_ridge
from gohsp.core.rotation import rotate
from gohsp.errors import NonFiniteError, PlanError
from gohsp.models import check_finite, compact, describe, relative_difference
from gohsp.structure import (
    Absent,
    AttentionKept,
    AttentionWidths,
    FfnKept,
    FfnWidths,
    Kept,
    Network,
    SublayerKept,
    Widths,
    absent,
    keep_all,
    keep_everything,
    keep_none,
    kept_widths,
)
from linear import queries_keys

FULL = (AttentionWidths(heads=4, qk=8, vo=8), FfnWidths(units=64))
SMALL = (AttentionWidths(heads=3, qk=3, vo=5), FfnWidths(units=24))
NOTHING = (AttentionWidths(heads=0, qk=0, vo=0), FfnWidths(units=0))
HOW = RepairSettings(guidance=0.0, ridge=0.1)
PARTS = ("attn", "mlp")
BlockWidths = tuple[AttentionWidths, FfnWidths]


def changed(block: BlockWidths, **widths: int) -> BlockWidths:
    """A block's widths with some of them changed."""
    units = widths.pop("units", block[1].units)
    return replace(block[0], **widths), FfnWidths(units=units)


def named(*blocks: tuple[Any, Any]) -> dict[str, Any]:
    """What belongs to attention and FFN of successive blocks, by the sub-layers' names."""
    return {f"blocks.{i}.{part}": of for i, block in enumerate(blocks) for part, of in zip(PARTS, block, strict=True)}


def trunk_of(model: nn.Module, images: Tensor) -> Trunk:
    return open_trunk(model, describe(model), images[:1])


def entering(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What enters the first block, in batches of 12 images."""
    trunk = trunk_of(model, images)
    with torch.no_grad():
        return [trunk.enter(batch) for batch in images.split(12)]


@dataclass(frozen=True)
class Cut:
    dense: nn.Module
    model: nn.Module
    network: Network
    kept: dict[str, SublayerKept]


def cut(
    dense: nn.Module,
    images: Tensor,
    widths: Widths,
    *,
    how: RepairSettings = HOW,
    model: nn.Module | None = None,
    scores: HeadScores | None = None,
    network: Network | None = None,
    **rest: Any,
) -> Cut:
    """``model`` (a copy of ``dense``) reconstructed at ``widths``."""
    model = copy.deepcopy(dense if model is None else model)
    network = network or describe(model)
    trunk, entered = trunk_of(dense, images), entering(dense, images)
    return Cut(dense, model, network, reconstruct(trunk, model, network, widths, entered, scores, how, **rest))


def streams(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The residual stream before every block, between its branches, and behind the last block."""
    seen: list[Tensor] = []
    watch = {f"blocks.{i}.{norm}": seen.append for i in range(len(model.blocks)) for norm in ("norm1", "norm2")}
    with observe_inputs(model, {**watch, "norm": seen.append}), torch.no_grad():
        model(images)
    return seen


def read(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What the module ``name`` reads."""
    seen: list[Tensor] = []
    with observe_inputs(model, {name: seen.append}), torch.no_grad():
        model(images)
    return seen[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.1},
        {"proj_bias": False},
        {"qk_norm": True, "scale_mlp_norm": True},
        {"architecture": "vit_base_patch16_rpn_224"},
    ],
)
@pytest.mark.parametrize("ridge", [1e-6, 1.0])
def test_keeping_everything_changes_nothing(
    arguments: dict, ridge: float, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    dense = make_model(mlp_ratio=2, **arguments)
    result = cut(dense, images, named(FULL, FULL), how=replace(HOW, ridge=ridge))
    assert result.kept == keep_everything(result.network)
    assert relative_difference(dense, result.model, images) < 1e-4
    for name, value in result.model.state_dict().items():
        if not name.endswith(("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")):
            assert torch.equal(value, dense.state_dict()[name]), name


SUPPORT = (
    AttentionKept(heads=(0, 2, 3), qk=((0, 5, 7), (1, 2, 3), (2, 4, 6)), vo=((0, 1, 2, 3, 7),) * 3),
    FfnKept(units=tuple(range(1, 64, 3))),
)
WEIGHTS = {
    "blocks.0.attn": torch.tensor([3.0, 0.5, 0.5, 0.4, 0.6]),
    "blocks.1.attn": torch.tensor([5.0, 0, 0, 0, 0]),
    "blocks.1.mlp": torch.tensor([4.2, 0.2, 0.2, 0.2, 0.2]),
}


@pytest.fixture
def fixed_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ridge of the settings everywhere, in place of one chosen by folds."""
    monkeypatch.setattr(reconstruction, "cross_validated_ridge", lambda _splits, _fitted, start: start)


@pytest.mark.usefixtures("fixed_ridge")
@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1}, {"proj_bias": False}], ids=str)
@pytest.mark.parametrize("chosen", [True, False], ids=["support", "selected"])
@pytest.mark.parametrize("weights", [WEIGHTS, None], ids=["weights", "even"])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_every_readout_is_the_least_squares_fit_to_the_dense_stream(
    arguments: dict,
    chosen: bool,
    weights: TokenWeights | None,
    ridge: float,
    make_model: Callable[..., nn.Module],
    images: Tensor,
) -> None:
    """One explicit system a readout: a row a token, and rows that hold the kept columns to what they were."""
    dense = make_model(mlp_ratio=2, **arguments)
    if chosen:
        support = named(SUPPORT, (SUPPORT[0], FfnKept(units=tuple(range(20)))))
        how = replace(HOW, ridge=ridge)
        result = cut(dense, images, kept_widths(support), how=how, weights=weights, support=support)
        assert result.kept == support
    else:  # all values of a head stay, or their basis would be another than the dense model's
        widths = named(changed(SMALL, vo=8), changed(SMALL, vo=8, heads=2))
        result = cut(dense, images, widths, how=replace(HOW, ridge=ridge), weights=weights)
        assert kept_widths(result.kept) == widths
    model, goal, own = result.model, streams(dense, images), streams(result.model, images)
    for i, sub in enumerate(result.network.present):
        fitted, before = (m.get_submodule(sub.readout.module) for m in (model, dense))
        gain = torch.ones(32) if sub.readout.gain is None else model.get_parameter(sub.readout.gain).detach()
        gain = gain.double()
        inputs = read(model, sub.readout.module, images).double()
        target = (goal[i + 1] - own[i]).double()
        old = before.weight.detach().double()
        columns = result.kept[sub.name].flat(sub.widths.unit_kinds[-1], sub.widths)
        if fitted.bias is not None:
            inputs = torch.cat([inputs, torch.ones(*inputs.shape[:2], 1)], dim=-1)
            old = torch.cat([old, before.bias.detach().double()[:, None]], dim=1)
            columns = [*columns, inputs.shape[-1] - 1]
        weight = (weights or {}).get(sub.name, torch.ones(5))
        root = (weight.double() / (32 * weight.sum())).sqrt()[None, :, None]
        inputs, target = (root * inputs).flatten(0, 1), (root * target).flatten(0, 1)
        hold = (ridge * inputs.square().sum(0).mean()).sqrt()
        design = torch.cat([inputs[:, columns], hold * torch.eye(len(columns))])
        solution = torch.linalg.lstsq(design, torch.cat([target, hold * (old * gain[:, None])[:, columns].T]))
        got = fitted.weight.detach().double()
        gone = [u for u in range(got.shape[1]) if u not in columns]
        assert not got[:, gone].any()
        if fitted.bias is not None:
            got = torch.cat([got, fitted.bias.detach().double()[:, None]], dim=1)
        expected = solution.solution.T / gain[:, None]
        torch.testing.assert_close(got[:, columns], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.usefixtures("fixed_ridge")
@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1}], ids=str)
@pytest.mark.parametrize("weights", [WEIGHTS, None], ids=["weights", "even"])
@pytest.mark.parametrize("gone", ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"])
def test_what_is_left_of_an_absent_sublayer_is_the_mean_that_it_should_have_written(
    gone: str, weights: TokenWeights | None, arguments: dict, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    """Every other sub-layer stays whole, but is fitted, too; of a fit with a bias the residuals' mean is 0."""
    dense = make_model(mlp_ratio=2, **arguments)
    widths = named(FULL, FULL)
    widths[gone] = absent(widths[gone])
    result = cut(dense, images, widths, how=replace(HOW, ridge=1e-9), weights=weights)
    assert kept_widths(result.kept) == widths
    small = compact(result.model, result.kept, images).model
    i = list(widths).index(gone)
    due = streams(dense, images)[i + 1] - streams(result.model, images)[i]
    share = (weights or {}).get(gone, torch.ones(5))
    expected = (due * share[:, None]).mean(0).sum(0) / share.sum()
    torch.testing.assert_close(small.get_submodule(gone).bias.detach(), expected, rtol=1e-3, atol=1e-4)
    assert sum(isinstance(sub, Absent) for sub in describe(small).sublayers) == 1


@pytest.mark.parametrize("gone", ["attn", "mlp", "both"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_follows_makes_up_for_an_absent_sublayer(
    gone: str, bias: bool, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    dense = make_model(mlp_ratio=2, proj_bias=bias)
    first = {"attn": (NOTHING[0], FULL[1]), "mlp": (FULL[0], NOTHING[1]), "both": NOTHING}[gone]
    widths = named(first, SMALL)
    result = cut(dense, images, widths)
    assert kept_widths(result.kept) == widths
    small = compact(result.model, result.kept, images).model
    assert describe(small).widths == widths
    assert relative_difference(result.model, small, images) < 1e-5
    masked = copy.deepcopy(dense)
    surgery.mask(masked, result.network, result.kept)
    goal = streams(dense, images)[-1]
    errors = [float((streams(m, images)[-1] - goal).square().mean()) for m in (result.model, masked)]
    assert errors[0] < 0.9 * errors[1]


def test_queries_and_keys_keep_the_best_of_the_centred_logits_on_what_really_enters(
    make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    """Against the singular values of the logits that the second block had, the first one being cut already."""
    dense = make_model(mlp_ratio=2)
    result = cut(dense, images, named(changed(SMALL, heads=1), changed(FULL, qk=3)))
    sub = result.network.attentions[1]
    x = read(result.model, sub.name, images)

    def centred_logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            q, k = (t.double() for t in queries_keys(model, sub, x))
        q, k = q.transpose(0, 1).flatten(1, 2), (k - k.mean(2, keepdim=True)).transpose(0, 1).flatten(1, 2)
        return q @ k.transpose(1, 2)

    logits = centred_logits(dense)
    error = (logits - centred_logits(result.model)).square().sum((1, 2))
    best = torch.linalg.svdvals(logits)[:, 3:].square().sum(1)
    torch.testing.assert_close(error, best, rtol=1e-3, atol=0)


def independent(dense: nn.Module, images: Tensor, widths: Widths) -> nn.Module:
    """Each sub-layer projected by itself, on what the dense model sends it."""
    model = copy.deepcopy(dense)
    network = describe(model)
    moments = rotate(model, network, collect_moments(model, network, [images]))
    for sub in network.present:
        values, of = constrained(model, sub), moments[sub.name]
        kept = select(sub, values, of, widths[sub.name], HOW)
        for entry, value in project(on_support(sub, values, of, kept, HOW), values).items():
            values[entry].copy_(value)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_earlier_blocks_are_repaired(seed: int, make_model: Callable[..., nn.Module]) -> None:
    dense = make_model(mlp_ratio=2, depth=3, seed=seed)
    images, fresh = torch.randn(640, 3, 16, 16).split([512, 128])
    widths = named(SMALL, SMALL, SMALL)
    with torch.no_grad():
        apart = independent(dense, images, widths)
    joint = cut(dense, images, widths).model
    for shown in (images, fresh):  # also on images that nothing was fitted to
        goal = streams(dense, shown)[-1]
        errors = [float((streams(m, shown)[-1] - goal).square().mean()) for m in (joint, apart)]
        assert errors[0] < 0.9 * errors[1]


def test_few_sums_of_outputs_tell_the_ridge(
    make_model: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, chosen = make_model(mlp_ratio=2), []
    outputs: set[int] = set()

    def watched(splits: list, fitted: Callable[..., Tensor], start: float) -> float:
        outputs.add(len(fitted(splits[0][0], start)))
        chosen.append(cross_validated_ridge(splits, fitted, start))
        return chosen[-1]

    monkeypatch.setattr(reconstruction, "cross_validated_ridge", watched)
    cut(dense, images, named(SMALL, SMALL))
    assert outputs == {32}  # every output of a narrow model
    whole, chosen = chosen, []
    outputs.clear()
    monkeypatch.setattr(reconstruction, "PROBES", 16)
    cut(dense, images, named(SMALL, SMALL))
    assert outputs == {16}
    for few, all_of_them in zip(chosen, whole, strict=True):
        assert 1 / 3.2 <= few / all_of_them <= 3.2  # at most a neighbour


def test_repair_and_ffn_cut_take_the_ridge_that_folds_choose(
    make_model: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_model(mlp_ratio=2)
    support = keep_everything(describe(dense))
    support |= {f"blocks.{i}.mlp": FfnKept(units=tuple(range(i, 64, 3))) for i in range(2)}
    seen: list[Tensor] = []

    def choose(splits: list, fitted: Callable[..., Tensor], _start: float) -> float:
        assert len(splits) == 4
        seen.append(fitted(splits[0][0], 0.5))
        return 0.5

    monkeypatch.setattr(reconstruction, "cross_validated_ridge", choose)
    chosen = cut(dense, images, kept_widths(support), how=replace(HOW, ridge=1e-3), support=support)
    monkeypatch.setattr(reconstruction, "cross_validated_ridge", lambda _splits, _fitted, start: start)
    given = cut(dense, images, kept_widths(support), how=replace(HOW, ridge=0.5), support=support)
    for name, value in chosen.model.state_dict().items():
        torch.testing.assert_close(value, given.model.state_dict()[name], rtol=1e-5, atol=1e-6)
    for candidate, i in ((seen[1], 0), (seen[3], 1)):  # FFN candidates are cut already
        assert candidate.abs().sum(0).nonzero().flatten().tolist() == [*range(i, 64, 3), 64]


@pytest.mark.usefixtures("fixed_ridge")
@pytest.mark.parametrize(("name", "share"), [("vit_tiny_patch16_224", 0.5), ("vit_base_patch16_rpn_224", 0.8)])
def test_a_block_makes_up_for_the_one_before_it(
    name: str, share: float, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    """The first block is cut hard, the second not at all: fitted to the dense stream, it still has work to do.

    Behind a norm it can do less of it.
    """
    dense = make_model(name, mlp_ratio=2)
    result = cut(dense, images, named(SMALL, FULL), how=replace(HOW, ridge=1e-4))
    idle = copy.deepcopy(result.model)
    idle.blocks[1].load_state_dict(dense.blocks[1].state_dict())
    goal = streams(dense, images)[-1]
    errors = [float((streams(m, images)[-1] - goal).square().mean()) for m in (result.model, idle)]
    assert errors[0] < share * errors[1]


@pytest.mark.parametrize(
    "support",
    [named(SUPPORT, SUPPORT), named((keep_none(FULL[0]), SUPPORT[1]), (SUPPORT[0], keep_none(FULL[1]))), None],
    ids=["support", "absent", "selected"],
)
def test_what_the_cut_removes_has_nothing_left_to_say(support: Kept | None, model: nn.Module, images: Tensor) -> None:
    widths = kept_widths(support) if support else named(SMALL, changed(SMALL, heads=2, units=9))
    result = cut(model, images, widths, support=support)
    assert kept_widths(result.kept) == widths
    assert support is None or result.kept == support
    masked = copy.deepcopy(result.model)
    surgery.mask(masked, result.network, result.kept)
    assert relative_difference(result.model, masked, images) < 1e-6
    small = compact(result.model, result.kept, images).model
    assert describe(small).widths == widths
    assert relative_difference(result.model, small, images) < 1e-5
    assert relative_difference(model, result.model, images) > 1e-2  # the cut was felt


def test_every_head_keeps_its_own_dimensions(model: nn.Module, network: Network, images: Tensor) -> None:
    """Where the basis must stay, the strongest queries and keys of a head may be any of them."""
    subs = (replace(s, rotatable=frozenset()) if s in network.attentions else s for s in network.sublayers)
    fixed = replace(network, sublayers=tuple(subs))
    scores = {"blocks.0.attn": (0.1, 0.4, 0.2, 0.3), "blocks.1.attn": (0.1, 0.2, 0.3, 0.4)}  # the first head goes
    how = replace(HOW, guidance=1.0)
    result = cut(model, images, named(SMALL, SMALL), network=fixed, scores=scores, how=how)
    masked = copy.deepcopy(result.model)
    surgery.mask(masked, network, result.kept)
    assert relative_difference(result.model, masked, images) < 1e-6
    attentions = [result.kept[sub.name] for sub in network.attentions]
    assert len({dims for of in attentions for dims in of.qk}) > 3
    for block, before, of in zip(result.model.blocks, model.blocks, attentions, strict=True):
        for part in (0, 32):
            for head, dims in zip(of.heads, of.qk, strict=True):
                kept = [part + 8 * head + j for j in dims]
                assert torch.equal(block.attn.qkv.weight[kept], before.attn.qkv.weight[kept])
        assert torch.equal(block.attn.qkv.weight[64:], before.attn.qkv.weight[64:])


def test_a_chosen_support_is_kept_in_its_basis(model: nn.Module, images: Tensor) -> None:
    support = named(SUPPORT, SUPPORT)
    result = cut(model, images, kept_widths(support), support=support)
    for block, before in zip(result.model.blocks, model.blocks, strict=True):
        now, then = (b.attn.qkv.weight.unflatten(0, (3, 4, 8)) for b in (block, before))
        for head, dims in zip(SUPPORT[0].heads, SUPPORT[0].qk, strict=True):
            gone = [j for j in range(8) if j not in dims]
            assert torch.equal(now[:2, head, dims], then[:2, head, dims])
            assert not now[:2, head, gone].any()
        assert torch.equal(now[2], then[2])


def test_layer_scale_decides_what_is_worth_keeping(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    dense = make_model(mlp_ratio=2, init_values=1.0)
    with torch.no_grad():
        for block in dense.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                half = linear.in_features // 2  # the first half of the units writes to the first half of the channels
                linear.weight[:16, half:] = 0
                linear.weight[16:, :half] = 0
                linear.weight[:16] *= 10
            for scale in (block.ls1, block.ls2):
                scale.gamma[:16] = 1e-3
    half = changed(FULL, heads=2, units=32)
    kept = cut(dense, images, named(half, half)).kept
    for i in range(2):
        assert kept[f"blocks.{i}.attn"].heads == (2, 3)
        assert kept[f"blocks.{i}.mlp"].units == tuple(range(32, 64))


def test_heads_follow_their_scores(model: nn.Module, images: Tensor) -> None:
    scores = {"blocks.0.attn": (0.1, 0.4, 0.2, 0.3), "blocks.1.attn": (0.4, 0.1, 0.3, 0.2)}
    half = named(changed(FULL, heads=2), changed(FULL, heads=2))
    guided = cut(model, images, half, scores=scores, how=replace(HOW, guidance=1.0)).kept
    assert [guided[name].heads for name in scores] == [(1, 3), (0, 2)]
    assert cut(model, images, half, scores=scores).kept == cut(model, images, half).kept


@pytest.mark.parametrize("widths", [named(FULL, FULL), named(SMALL, SMALL)], ids=["dense", "cut"])
def test_a_channel_that_layer_scale_shuts_off(
    widths: Widths, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    dense = make_model(mlp_ratio=2, init_values=0.1)
    with torch.no_grad():
        for block in dense.blocks:
            block.ls1.gamma[3] = 0
            block.ls2.gamma[[0, 7]] = 0
            block.ls2.gamma[5] = -1e-6
    result = cut(dense, images, widths)
    check_finite(result.model)
    assert torch.isfinite(result.model(images)).all()
    for name, parameter in result.model.named_parameters():
        if name.endswith("gamma"):
            assert torch.equal(parameter, dense.get_parameter(name))
    if widths == named(FULL, FULL):
        for block, before in zip(result.model.blocks, dense.blocks, strict=True):
            assert torch.equal(block.attn.proj.weight[3], before.attn.proj.weight[3])
            assert torch.equal(block.mlp.fc2.weight[[0, 7]], before.mlp.fc2.weight[[0, 7]])
            assert torch.equal(block.mlp.fc2.bias[[0, 7]], before.mlp.fc2.bias[[0, 7]])


class Disk(MutableSequence):
    """Tensors in files; every read gives a copy. Notes how many of its kind there are, and the most that there were."""

    made = now = most = 0

    def __init__(self, folder: Path) -> None:
        Disk.made, Disk.now = Disk.made + 1, Disk.now + 1
        Disk.most = max(Disk.most, Disk.now)
        self.folder = folder / f"store {Disk.made}"
        self.folder.mkdir()
        self.size = 0

    def __del__(self) -> None:
        Disk.now -= 1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return torch.load(self.folder / f"{index}.pt")

    def __setitem__(self, index: int, value: Tensor) -> None:
        assert 0 <= index < self.size
        torch.save(value, self.folder / f"{index}.pt")

    def __delitem__(self, index: int) -> None:
        raise NotImplementedError

    def insert(self, index: int, value: Tensor) -> None:
        assert index == self.size  # appended only
        self.size += 1
        self[index] = value


def test_streams_may_live_on_disk(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Both streams, the goal between a block's sub-layers and what its FFN's readout reads; a block's go with it."""
    expected = cut(model, images, named(SMALL, SMALL))
    got = cut(model, images, named(SMALL, SMALL), store=lambda: Disk(tmp_path))
    assert got.kept == expected.kept
    assert all(torch.equal(v, expected.model.state_dict()[k]) for k, v in got.model.state_dict().items())
    assert all(sorted(p.name for p in folder.iterdir()) == ["0.pt", "1.pt", "2.pt"] for folder in tmp_path.iterdir())
    assert (Disk.most, Disk.now) == (4, 0)


def test_streams_may_come_one_by_one_and_are_left_alone(model: nn.Module, images: Tensor) -> None:
    expected = cut(model, images, named(SMALL, SMALL))
    entered, other = entering(model, images), copy.deepcopy(model)
    before = [batch.clone() for batch in entered]

    def batches() -> Iterator[Tensor]:
        yield from entered

    kept = reconstruct(trunk_of(model, images), other, describe(model), named(SMALL, SMALL), batches(), None, HOW)
    assert kept == expected.kept
    assert relative_difference(expected.model, other, images) == 0
    assert all(torch.equal(a, b) for a, b in zip(entered, before, strict=True))


@pytest.mark.parametrize("original", ["dense", "small"])
def test_a_model_that_is_small_already(original: str, model: nn.Module, images: Tensor) -> None:
    """Its widths are not those of the model that it is fitted to, or both are narrow."""
    first = cut(model, images, named(SMALL, changed(SMALL, heads=2, units=30)))
    small = compact(first.model, first.kept, images).model
    reference = model if original == "dense" else small
    widths = named(changed(SMALL, qk=2, vo=4, units=20), changed(SMALL, heads=2, qk=2, vo=4, units=20))
    result = cut(reference, images, widths, model=small)
    assert kept_widths(result.kept) == widths
    assert describe(compact(result.model, result.kept, images).model).widths == widths
    # as good as what one cut makes of the dense model, or nearly
    goal = streams(model, images)[-1]
    once = streams(cut(model, images, widths).model, images)[-1]
    assert (streams(result.model, images)[-1] - goal).square().mean() < 1.6 * (once - goal).square().mean()


@pytest.mark.parametrize("gone", ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"])
def test_a_model_that_lacks_a_sublayer_already(gone: str, model: nn.Module, images: Tensor) -> None:
    widths = named(SMALL, SMALL)
    widths[gone] = absent(widths[gone])
    first = cut(model, images, widths)
    small = compact(first.model, first.kept, images).model
    # nothing more to cut, and the model's own stream to meet
    again = cut(small, images, widths)
    assert again.kept == keep_everything(again.network)
    assert relative_difference(small, again.model, images) < 1e-4
    # one more sub-layer, and some of the others
    less = named(*[changed(SMALL, qk=2, vo=4, units=20)] * 2)
    other = "blocks.0.mlp" if gone == "blocks.1.mlp" else "blocks.1.mlp"
    less |= {name: absent(widths[name]) for name in (gone, other)}
    more = cut(small, images, less)
    assert kept_widths(more.kept) == less
    smaller = compact(more.model, more.kept, images).model
    assert describe(smaller).widths == less
    assert relative_difference(more.model, smaller, images) < 1e-5


def test_a_small_model_is_drawn_back_to_the_dense_one(model: nn.Module, images: Tensor) -> None:
    """Nothing is cut; readouts that were spoilt are fitted to the dense stream again."""
    first = cut(model, images, named(SMALL, SMALL))
    small = compact(first.model, first.kept, images).model
    spoilt = copy.deepcopy(small)
    with torch.no_grad():
        for block in spoilt.blocks:
            block.mlp.fc2.weight.add_(0.2 * torch.randn(block.mlp.fc2.weight.shape))
    repaired = cut(model, images, named(SMALL, SMALL), model=spoilt, how=replace(HOW, ridge=1e-3)).model
    goal = streams(model, images)[-1]
    errors = [float((streams(m, images)[-1] - goal).square().mean()) for m in (repaired, small, spoilt)]
    assert errors[0] < 1.2 * errors[1] < errors[2]


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
@pytest.mark.parametrize("arguments", [{}, {"init_values": 1e-5}], ids=str)
def test_two_images_are_enough_to_stay_finite(
    ridge: float, arguments: dict, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    dense = make_model(mlp_ratio=2, **arguments)
    result = cut(dense, images[:2], named(SMALL, SMALL), how=replace(HOW, ridge=ridge))
    check_finite(result.model)
    assert torch.isfinite(result.model(images)).all()
    # ten tokens are matched by the 25 and 16 numbers that a readout has left for each channel
    compact(result.model, result.kept, images)


@pytest.mark.parametrize("training", [True, False])
def test_the_dense_model_and_both_modes_are_left_alone(training: bool, model: nn.Module, images: Tensor) -> None:
    expected = cut(model, images, named(SMALL, SMALL))
    for block in model.blocks:
        block.mlp.drop1.p = 0.9
    before, entered = copy.deepcopy(model.state_dict()), entering(model, images)
    dense = copy.deepcopy(model).train(training)
    calls = []
    arguments = (expected.network, named(SMALL, SMALL), entered, None, HOW)
    reconstruct(trunk_of(dense, images), model.train(not training), *arguments, advance=lambda: calls.append(1))
    assert (dense.training, model.training) == (training, not training)
    assert len(calls) == 2
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert relative_difference(expected.model, model.eval(), images) == 0  # dropout was off
    assert not any(module._forward_pre_hooks for m in (dense, model) for module in m.modules())


def test_lower_precision_ends_nearby(model: nn.Module, images: Tensor) -> None:
    lowered = []
    support = named(SUPPORT, SUPPORT)
    full = cut(model, images, kept_widths(support), support=support).model
    trunk, entered = trunk_of(model, images), entering(model, images)
    half = copy.deepcopy(model)
    for block in half.blocks:
        block.attn.register_forward_pre_hook(lambda *_: lowered.append(torch.is_autocast_enabled("cpu")))
    arguments = (describe(model), kept_widths(support), entered, None, HOW)
    reconstruct(trunk, half, *arguments, support=support, precision=torch.bfloat16)
    assert lowered
    assert all(lowered)
    assert 1e-6 < relative_difference(full, half, images) < 0.05
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_what_cannot_be_done_is_said(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(PlanError, match=r"'blocks\.1\.mlp': 'units' must be from 1 to 64, got 65"):
        cut(model, images, named(FULL, changed(FULL, units=65)))
    with pytest.raises(PlanError, match=r"the plan lacks \['blocks\.1\.attn', 'blocks\.1\.mlp'\]"):
        cut(model, images, named(FULL))


@pytest.mark.parametrize("rows", ["attn.qkv", "mlp.fc1", "norm1"])
@pytest.mark.parametrize("where", ["dense", "student"])
def test_non_finite_activations_are_named(
    rows: str, where: str, model: nn.Module, network: Network, images: Tensor, trunk: Trunk, entered: Tensor
) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        spoilt = (other if where == "student" else model).blocks[1].get_submodule(rows)
        spoilt.bias[-1] = torch.nan
    module = {"attn.qkv": r"attn\.proj", "mlp.fc1": r"mlp\.fc2", "norm1": "attn"}[rows]
    if where == "dense":
        module = module.replace("attn", r"attn\.proj") if rows == "norm1" else module
    whose = "in the model as given" if where == "dense" else "gohsp's doing"
    with pytest.raises(NonFiniteError, match=rf"input of module 'blocks\.1\.{module}' holds NaN.*{whose}"):
        reconstruct(trunk, other, network, named(SMALL, SMALL), [entered], None, HOW)


def test_a_given_support_is_carried_out_part_by_part() -> None:
    """Queries first, then heads and values; at a step of which a support takes nothing, nothing goes."""
    have = AttentionWidths(heads=3, qk=2, vo=2)
    support = AttentionKept(heads=(0, 2), qk=((0, 1), (0, 1)), vo=((1,), (0,)))
    assert only(support, have, have) == keep_all(have)
    by_value = only(support, have, replace(have, heads=2, vo=1))
    assert by_value == support
    narrow = replace(support, qk=((1,), (0,)))
    by_query = only(narrow, have, replace(have, qk=1))
    assert isinstance(by_query, AttentionKept)
    assert (by_query.heads, by_query.vo) == ((0, 1, 2), ((0, 1),) * 3)  # heads and values wait
    assert (by_query.qk[0], by_query.qk[2]) == narrow.qk
    assert only(keep_none(have), have, absent(have)) == keep_none(have)
