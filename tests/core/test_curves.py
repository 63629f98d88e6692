"""Damage curves against cuts that are carried out: what a cut changes is taken from whole passes of a cut copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gohsp.core import curves as of_curves
from gohsp.core.allocation import Curves, DamageCurve, WidthSettings, allowed_widths
from gohsp.core.capture import readout_gain
from gohsp.core.curves import count_steps, fits, measure_curves
from gohsp.core.moments import SublayerMoments, collect_moments
from gohsp.core.objective import Objective, classification, features, mean_distance
from gohsp.core.projection import RepairSettings, constrained, on_support, project, ranking_of, select
from gohsp.core.ridge import refit
from gohsp.errors import NonFiniteError
from gohsp.models import describe, resize
from gohsp.structure import Kind, Network, PresentSublayer, absent, excluding, narrowed

WIDTHS = WidthSettings(multiple=2, min_width=2, depth=True)
COARSE = WidthSettings(multiple=4, min_width=4, depth=True)
PLAIN = RepairSettings(guidance=0.0)
GUIDED = RepairSettings(guidance=1.0)
CLASSES = 5


def exact(objective: Objective, entries: int) -> Objective:
    """An objective whose draws go through all classes or outputs in turn: the mean over ``entries`` draws is exact."""
    turn: Iterator[int] = count()

    def draw(output: Tensor, _generator: torch.Generator) -> Tensor:
        k = next(turn) % entries
        if objective.name == "features":
            return output[:, k].sum()  # half the mean square over entries is the distance
        sure = output.log_softmax(-1)[:, k]
        return (sure * (entries * sure.detach().exp()).sqrt()).sum()

    return replace(objective, draw=draw)


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Curves]:
    """Curves without the scatter of draws, and as the quadratic form has them."""

    def measure(model: nn.Module, images: Tensor, *, entries: int = CLASSES, **options: Any) -> Curves:
        monkeypatch.setattr(of_curves, "DRAWS", entries)
        monkeypatch.setattr(of_curves, "CHECKED", 99)
        objective = exact(options.pop("objective", classification()), entries)
        return curves_of(model, images, objective=objective, **options)

    return measure


def curves_of(
    model: nn.Module,
    images: Tensor,
    *,
    objective: Objective | None = None,
    moments: Mapping[str, SublayerMoments] | None = None,
    network: Network | None = None,
    scores: Mapping[str, tuple[float, ...]] | None = None,
    widths: WidthSettings = COARSE,
    settings: RepairSettings = PLAIN,
    size: int = 32,
    **options: Any,
) -> Curves:
    network = network or describe(model)
    moments = moments or collect_moments(model, network, [images])
    given = (objective or classification(), images.split(size), moments, scores, widths, settings)
    return measure_curves(model, network, *given, **options)


def cut(
    model: nn.Module,
    sub: PresentSublayer,
    moments: SublayerMoments,
    kind: Kind,
    width: int,
    settings: RepairSettings,
    scores: Mapping[str, tuple[float, ...]] | None = None,
) -> nn.Module:
    """A copy of the model with one kind of one sub-layer cut and repaired."""
    copied = copy.deepcopy(model)
    values = constrained(copied, sub)
    options = {"ranking": ranking_of(sub, scores, torch.device("cpu")), "gain": readout_gain(copied, sub.readout)}
    kept = select(sub, values, moments, narrowed(sub.widths, kind, width), settings, **options)
    for entry, value in project(on_support(sub, values, moments, kept, settings), values).items():
        values[entry].copy_(value)
    return copied


def written(model: nn.Module, sub: PresentSublayer, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(sub.readout.module).register_forward_hook(lambda _m, _args, out: seen.append(out))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0]


def second_order(model: nn.Module, sub: PresentSublayer, change: Tensor, images: Tensor, objective: Objective) -> float:
    """Gauss-Newton's estimate of the distance that ``change`` of what a sub-layer writes makes, by forward derivatives.

    The output moves along ``J change``, and the distance's own second derivative there is known in closed form.
    """
    step = torch.zeros((), requires_grad=True)
    hook = model.get_submodule(sub.readout.module).register_forward_hook(lambda _m, _args, out: out + step * change)
    output = model(images)
    hook.remove()
    along = torch.stack([torch.autograd.grad(entry, step, retain_graph=True)[0] for entry in output.flatten()]).view_as(
        output
    )
    if objective.name == "features":
        return float(along.square().mean(1).mean() / 2)
    p = output.detach().softmax(-1)
    variance = (p * along.square()).sum(-1) - (p * along).sum(-1).square()
    return float(variance.mean() / 2)


def distance(objective: Objective, model: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return mean_distance(objective, [model(images)], [other(images)])


ARCHITECTURES: list[dict[str, Any]] = [{}, {"init_values": 0.5}, {"proj_bias": False, "qkv_bias": False}]


@pytest.mark.parametrize("arguments", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("name", ["classification", "features"])
def test_damage_is_that_of_the_cut_network_to_second_order(
    arguments: dict[str, Any],
    name: str,
    make_model: Callable[..., nn.Module],
    images: Tensor,
    exactly: Callable[..., Curves],
) -> None:
    images, objective = images[:8], classification() if name == "classification" else features()
    model = make_model(mlp_ratio=1, **arguments)
    network = describe(model)
    moments = collect_moments(model, network, [images])
    scores = {"blocks.0.attn": (0.1, 0.4, 0.2, 0.3), "blocks.1.attn": (0.4, 0.1, 0.3, 0.2)}
    how = RepairSettings(guidance=0.5)
    found = exactly(model, images, objective=objective, scores=scores, settings=how, moments=moments, size=5)
    assert set(found) == set(network.widths)
    for sub in network.present:
        dense = written(model, sub, images)
        for kind, curve in found[sub.name].items():
            for width, damage in zip(curve.widths[:-1], curve.damage, strict=False):
                other = cut(model, sub, moments[sub.name], kind, width, how, scores)
                change = written(other, sub, images) - dense
                expected = second_order(model, sub, change, images, objective)
                assert damage == pytest.approx(expected, rel=2e-3, abs=1e-6), (sub.name, kind, width)


@pytest.mark.parametrize("name", ["classification", "features"])
def test_damage_of_small_cuts_is_the_true_distance(
    name: str, model: Any, images: Tensor, exactly: Callable[..., Curves]
) -> None:
    objective = classification() if name == "classification" else features()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.mul_(0.03)
            block.mlp.fc2.weight.mul_(0.03)
    network = describe(model)
    moments = collect_moments(model, network, [images])
    found = exactly(model, images, objective=objective, moments=moments)
    for sub in network.present:
        for kind, curve in found[sub.name].items():
            for width, damage in zip(curve.widths[:-1], curve.damage, strict=False):
                true = distance(objective, model, cut(model, sub, moments[sub.name], kind, width, PLAIN), images)
                assert damage == pytest.approx(true, rel=0.1, abs=2e-6), (sub.name, kind, width)
                assert curve.damage[0] > 1e-5


@pytest.mark.parametrize("widths", [WIDTHS, replace(WIDTHS, depth=False)], ids=["with depth", "without"])
def test_an_ffns_curve_has_the_scale_of_one_measured_point(
    widths: WidthSettings, model: nn.Module, images: Tensor, exactly: Callable[..., Curves]
) -> None:
    network = describe(model)
    moments = collect_moments(model, network, [images])
    found = curves_of(model, images, moments=moments, widths=widths, seed=3)
    for sub in network.present:
        for kind, curve in found[sub.name].items():
            if kind != "ffn":
                continue
            at = of_curves.CHECKED + (curve.widths[0] == 0)
            other = cut(model, sub, moments[sub.name], kind, curve.widths[at], PLAIN)
            assert curve.damage[at] == pytest.approx(distance(classification(), model, other, images), rel=1e-3)
    plain = exactly(model, images, moments=moments, widths=widths)
    for name, of in plain.items():
        for kind, curve in of.items():
            ratios = [a / b for a, b in zip(found[name][kind].damage, curve.damage, strict=True) if b > 1e-4]
            assert kind != "ffn" or max(ratios) < 1.35 * min(ratios)  # one scale, and the scatter of draws


def test_large_cuts_are_told_by_their_order(model: nn.Module, images: Tensor, exactly: Callable[..., Curves]) -> None:
    """Far from the expansion numbers drift apart, but what hurts more is still said to."""
    from scipy.stats import spearmanr

    network = describe(model)
    moments = collect_moments(model, network, [images])
    found = exactly(model, images, moments=moments)
    pairs = [
        (damage, distance(classification(), model, cut(model, sub, moments[sub.name], kind, width, PLAIN), images))
        for sub in network.present
        for kind, curve in found[sub.name].items()
        for width, damage in zip(curve.widths[:-1], curve.damage, strict=False)
    ]
    assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.9


@pytest.mark.parametrize("name", ["classification", "features"])
def test_draws_estimate_the_mean_over_all_of_them(
    name: str, model: nn.Module, images: Tensor, exactly: Callable[..., Curves], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = classification() if name == "classification" else features()
    expected = exactly(model, images, objective=objective)
    monkeypatch.setattr(of_curves, "DRAWS", 64)  # CHECKED stays as it is
    found = curves_of(model, images, objective=objective)
    pairs = [
        (damage, expected[sub][kind].damage[i])
        for sub, of in found.items()
        for kind, curve in of.items()
        for i, damage in enumerate(curve.damage[:-1])
    ]
    assert sum(a for a, _ in pairs) == pytest.approx(sum(b for _, b in pairs), rel=0.05)
    assert all(a == pytest.approx(b, rel=0.3, abs=1e-6) for a, b in pairs)


def test_nothing_is_left_changed(model: nn.Module, network: Network, images: Tensor) -> None:
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calls: list[int] = []
    curves = curves_of(model, images, widths=WIDTHS, advance=lambda: calls.append(1))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == count_steps(network, WIDTHS, [len(images)])
    for sub in network.present:
        assert set(curves[sub.name]) == set(sub.widths.kinds)
        for kind, of in curves[sub.name].items():
            allowed = allowed_widths(sub, kind, WIDTHS)
            assert (of.widths[0], of.widths[-1]) == (allowed[0], allowed[-1])
            assert set(of.widths) <= set(allowed)
            assert list(of.widths) == sorted(set(of.widths))
            assert len(of.widths) == len(of.damage)
            assert of.damage[-1] == 0
            assert min(of.damage) >= 0
            assert of.damage[0] > 1e-4  # the smallest width is felt
            assert of(allowed[-1]) == 0


@pytest.mark.parametrize(("images_seen", "passes"), [(1, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_steps_are_cuts_and_passes(images_seen: int, passes: int, network: Network) -> None:
    cuts = sum(
        len(curve_widths) - 1
        for sub in network.present
        for kind in sub.widths.kinds
        for curve_widths in [of_curves._grid(sub, kind, WIDTHS)]
    )
    ffns = len(network.present) - len(network.attentions)
    assert count_steps(network, WIDTHS, [images_seen]) == cuts + passes + ffns


@pytest.mark.parametrize("place", ["an attention with its queries cut", "the second pass"])
def test_the_model_is_restored_even_when_measuring_fails(
    place: str, model: nn.Module, network: Network, images: Tensor
) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    moments = collect_moments(model, network, [images])
    passes: list[bool] = []

    def fail_later(*_: object) -> None:
        changed = not torch.equal(model.get_parameter("blocks.1.attn.qkv.weight"), before["blocks.1.attn.qkv.weight"])
        passes.append(changed)
        if changed or (place == "the second pass" and len(passes) == 2):
            raise RuntimeError("out of memory")

    watched = "blocks.1.attn" if place.startswith("an attention") else "patch_embed"
    handle = model.get_submodule(watched).register_forward_pre_hook(fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        curves_of(model, images, moments=moments, network=network, size=16)
    handle.remove()
    assert passes[-1] == place.startswith("an attention")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("seed", [0, 1])
def test_heads_go_in_the_order_of_their_scores(
    seed: int, model: Any, network: Network, images: Tensor, exactly: Callable[..., Curves]
) -> None:
    """Against a refit by hand of the output projection to the heads that score highest."""
    scores = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed))
    moments = collect_moments(model, network, [images])
    by_name = {f"blocks.{i}.attn": tuple(of.tolist()) for i, of in enumerate(scores)}
    found = exactly(model, images, scores=by_name, settings=GUIDED, moments=moments)
    for i, sub in enumerate(network.attentions):
        curve = found[sub.name]["head"]
        assert curve.widths == (0, 1, 2, 3, 4)
        for heads, damage in zip((1, 2, 3), curve.damage[1:], strict=False):
            keep = torch.zeros(4, dtype=torch.bool)
            keep[scores[i].topk(heads).indices] = True
            other = copy.deepcopy(model)
            proj = other.blocks[i].attn.proj
            full = torch.cat([proj.weight, proj.bias[:, None]], dim=1).detach().double()
            stay = torch.cat([keep.repeat_interleave(8), torch.ones(1, dtype=torch.bool)])
            fitted = refit(moments[sub.name].read, full, stay, GUIDED.ridge).float()
            proj.weight.data, proj.bias.data = fitted[:, :-1], fitted[:, -1]
            change = written(other, sub, images) - written(model, sub, images)
            assert damage == pytest.approx(second_order(model, sub, change, images, classification()), rel=1e-3)


def test_at_width_0_the_mean_of_what_was_written_is_left(
    model: nn.Module, network: Network, images: Tensor, exactly: Callable[..., Curves]
) -> None:
    found = exactly(model, images)
    for sub in network.present:
        before = written(model, sub, images)
        expected = second_order(model, sub, before.mean((0, 1)) - before, images, classification())
        for kind in sub.widths.kinds:
            curve = found[sub.name][kind]
            if kind in ("head", "ffn"):
                assert curve.widths[0] == 0
                assert curve.damage[0] == pytest.approx(expected, rel=1e-3)
            else:
                assert curve.widths[0] > 0
    shallow = exactly(model, images, widths=replace(COARSE, depth=False))
    for name, of in shallow.items():
        for kind, curve in of.items():
            skipped = int(found[name][kind].widths[0] == 0)
            assert curve.widths == found[name][kind].widths[skipped:]
            assert curve.damage == pytest.approx(found[name][kind].damage[skipped:])


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["head", "qk", "vo"], {"blocks.0.mlp": {"ffn"}, "blocks.1.mlp": {"ffn"}}),
        (["blocks.0"], {"blocks.1.attn": {"head", "qk", "vo"}, "blocks.1.mlp": {"ffn"}}),
        (["qk", "blocks.1.mlp", "blocks.0.attn"], {"blocks.0.mlp": {"ffn"}, "blocks.1.attn": {"head", "vo"}}),
    ],
)
def test_what_is_excluded_has_no_curve(
    exclude: list[str], left: dict[str, set[str]], network: Network, model: nn.Module, images: Tensor
) -> None:
    held = excluding(network, exclude)
    calls: list[int] = []
    curves = curves_of(model, images, network=held, advance=lambda: calls.append(1))
    assert {name: set(of) for name, of in curves.items()} == left
    assert len(calls) == count_steps(held, COARSE, [len(images)])
    assert fits(curves, held, COARSE)
    assert not fits(curves, network, COARSE)
    attention = left.get("blocks.1.attn", set())
    if "qk" in exclude and "head" in attention:  # an attention that is not free in all its kinds does not go
        assert curves["blocks.1.attn"]["head"].widths == (1, 2, 3, 4)


def test_where_nothing_may_be_cut_there_are_no_curves(model: nn.Module, network: Network, images: Tensor) -> None:
    held = excluding(network, ["blocks.0", "blocks.1"])
    assert curves_of(model, images, network=held) == {}
    assert fits({}, held, COARSE)


@pytest.mark.parametrize("gone", ["blocks.0.attn", "blocks.1.mlp"])
def test_an_absent_sublayer_has_no_curve(gone: str, model: nn.Module, network: Network, images: Tensor) -> None:
    resize(model, {**network.widths, gone: absent(network.widths[gone])})
    again = describe(model)
    curves = curves_of(model, images)
    assert set(curves) == set(network.widths) - {gone}
    assert fits(curves, again, COARSE)
    assert not fits(curves, network, COARSE)


def test_curves_fit_the_network_and_the_widths_they_were_measured_at(
    model: nn.Module, network: Network, images: Tensor
) -> None:
    curves = curves_of(model, images)
    assert fits(curves, network, COARSE)
    for other in (WIDTHS, replace(COARSE, depth=False), replace(COARSE, min_heads=2), replace(COARSE, min_ffn=0.5)):
        assert not fits(curves, network, other)
    ffn = curves["blocks.0.mlp"]["ffn"]

    def spoilt(**change: Any) -> Curves:
        return {**curves, "blocks.0.mlp": {"ffn": replace(ffn, **change)}}

    assert fits(spoilt(), network, COARSE)
    for damage in (math.nan, math.inf, -1e-9):
        assert not fits(spoilt(damage=(damage, *ffn.damage[1:])), network, COARSE)
    assert not fits(spoilt(damage=ffn.damage[1:]), network, COARSE)
    assert not fits(spoilt(widths=(*ffn.widths[:-1], 63)), network, COARSE)
    assert not fits({name: of for name, of in curves.items() if name != "blocks.1.attn"}, network, COARSE)
    assert not fits({**curves, "blocks.2.mlp": {"ffn": DamageCurve((0, 64), (1.0, 0.0))}}, network, COARSE)
    assert not fits({**curves, "blocks.0.mlp": {}}, network, COARSE)


def test_dropout_is_off_while_damage_is_measured(model: Any, network: Network, images: Tensor) -> None:
    moments = collect_moments(model, network, [images])
    expected = curves_of(model, images, moments=moments)
    model.train()
    for block in model.blocks:
        block.mlp.drop1.p = block.attn.attn_drop.p = 0.9
    assert curves_of(model, images, moments=moments) == expected


def test_batches_do_not_matter(model: nn.Module, images: Tensor, exactly: Callable[..., Curves]) -> None:
    whole, parts = exactly(model, images), exactly(model, images, size=5)
    for name, of in whole.items():
        for kind, curve in of.items():
            assert parts[name][kind].widths == curve.widths
            assert parts[name][kind].damage == pytest.approx(curve.damage, rel=1e-3)


def test_the_seed_decides_what_is_drawn(model: nn.Module, images: Tensor) -> None:
    first, again, other = (curves_of(model, images, seed=seed) for seed in (0, 0, 1))
    assert first == again
    for name, of in first.items():
        for kind, curve in of.items():
            assert other[name][kind].widths == curve.widths
            assert other[name][kind].damage != curve.damage
            assert other[name][kind].damage == pytest.approx(curve.damage, rel=0.9)


def test_lower_precision_measures_about_the_same(model: nn.Module, network: Network, images: Tensor) -> None:
    moments = collect_moments(model, network, [images])
    lowered: list[bool] = []
    model.head.register_forward_pre_hook(lambda *_: lowered.append(torch.is_autocast_enabled("cpu")))
    full = curves_of(model, images, moments=moments, network=network, objective=features())
    half = curves_of(model, images, moments=moments, network=network, objective=features(), precision=torch.bfloat16)
    assert lowered == [False] * 4 + [True] * 4  # the gradients, the reference and both FFNs
    for name, of in full.items():
        for kind, curve in of.items():
            assert half[name][kind].damage == pytest.approx(curve.damage, rel=0.2, abs=0.01)
            assert half[name][kind].damage != curve.damage


def test_compensation_softens_the_damage(model: nn.Module, images: Tensor, exactly: Callable[..., Curves]) -> None:
    repaired = exactly(model, images, settings=PLAIN)
    plain = exactly(model, images, settings=RepairSettings(guidance=0.0, ridge=1e6))
    for name, kind in (("blocks.0.mlp", "ffn"), ("blocks.1.mlp", "ffn"), ("blocks.0.attn", "vo")):
        assert sum(repaired[name][kind].damage) < 0.8 * sum(plain[name][kind].damage)


def test_what_is_not_finite_is_refused(model: Any, network: Network, images: Tensor) -> None:
    moments = collect_moments(model, network, [images])
    before = copy.deepcopy(model.state_dict())
    huge = replace(classification(), draw=lambda output, _generator: output.sum() * 1e30)
    with pytest.raises(NonFiniteError, match=r"the damage of cuts of head in 'blocks\.0\.attn' .*gohsp's doing"):
        curves_of(model, images, moments=moments, objective=huge)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.head.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="the model's output holds NaN"):
        curves_of(model, images, moments=moments)
