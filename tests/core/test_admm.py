from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core import admm
from gohsp.core.admm import AdmmSettings, AdmmState
from gohsp.core.moments import SublayerMoments, collect_moments, tensors_of
from gohsp.core.projection import Metric, RepairSettings, on_support, project
from gohsp.errors import ConfigError, PlanError
from gohsp.models import compact, describe, resized
from gohsp.structure import AttentionWidths, FfnKept, FfnWidths, Network, absent, keep_none, kept_widths, unit_count

FREE = RepairSettings(guidance=0)
PARTS = {"attn": AttentionWidths(heads=2, qk=4, vo=4), "mlp": FfnWidths(units=24)}
SMALL = {f"blocks.{i}.{part}": of for i in range(2) for part, of in PARTS.items()}
SCORES = {"blocks.0.attn": (0.4, 0.1, 0.2, 0.3), "blocks.1.attn": (0.1, 0.4, 0.3, 0.2)}
METRICS: tuple[Metric, ...] = ("norm", "data")
TEXTBOOK = AdmmSettings(
    penalty="coupled",
    rho_start=1.0,
    rho_end=1.0,
    interval=1,
    reselect=1,
    freeze=1.0,
    hysteresis=0.0,
    tolerance=1e-5,
    metric="norm",
)


@pytest.fixture
def start(
    model: nn.Module, network: Network, moments: dict[str, SublayerMoments]
) -> Callable[[AdmmSettings], AdmmState]:
    return lambda settings: admm.start(model, network, SMALL, moments, None, settings, repair=FREE)


def copies(values: Mapping[str, dict]) -> dict[str, dict]:
    return {name: {k: v.clone() for k, v in of.items()} for name, of in values.items()}


def pairs(*values: Mapping[str, dict]) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of several such collections that belong together."""
    yield from (tuple(of[name][k] for of in values) for name, first in values[0].items() for k in first)


def towards(state: AdmmState, targets: Mapping[str, dict]) -> None:
    """Gradient of ``1/2 ||W - T||^2`` on every constrained tensor, none elsewhere."""
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for name, weights in state.weights.items():
        for entry, weight in weights.items():
            grad = state.model.get_parameter(entry.parameter).grad
            grad.narrow(entry.axis, entry.start, weight.shape[entry.axis]).copy_(weight - targets[name][entry])


def test_a_quadratic_loss_ends_at_the_projection_of_its_minimum(start: Callable[..., AdmmState]) -> None:
    """min 1/2 ||W - T||^2 on the set is the projection of T; its multiplier rho U is T - W where W is held at 0."""
    state = start(TEXTBOOK)
    targets = copies(state.weights)
    generator = torch.Generator().manual_seed(5)
    strong = state.kept
    for sub in state.network.present:
        for kind in sub.widths.unit_kinds:  # a clear-cut minimum: what the first support keeps is large
            keep = strong[sub.name].flat(kind, sub.widths)
            for entry in sub.slices(kind):
                noise = torch.randn(targets[sub.name][entry].shape, generator=generator)
                noise.movedim(entry.axis, 0)[keep] *= 10
                targets[sub.name][entry] = noise
    for _ in range(40):
        towards(state, targets)
        admm.add_penalty_gradients(state)
        torch.optim.SGD(state.model.parameters(), lr=1 / (1 + state.rho)).step()  # the W-step's exact minimum
        state = admm.after_step(state, progress=0.5)

    assert state.kept == strong
    assert state.status == "converged"
    assert state.trace[-1].primal < 1e-6
    assert state.trace[-1].dual < 1e-6
    assert state.trace[5].primal > state.trace[10].primal > state.trace[20].primal
    for sub in state.network.present:
        name, target = sub.name, targets[sub.name]
        projection = on_support(sub, target, state.moments[name], strong[name], FREE, metric="norm")
        for entry, expected in project(projection, target).items():
            torch.testing.assert_close(state.weights[name][entry], expected, rtol=1e-4, atol=1e-4)
            multiplier = state.rho * state.duals[name][entry]
            torch.testing.assert_close(multiplier, target[entry] - expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dual_step", [1.0, 0.3])
def test_steps_follow_the_unscaled_algorithm_while_rho_grows(
    metric: Metric, dual_step: float, start: Callable[..., AdmmState]
) -> None:
    """Against ADMM with a plain multiplier ``y``, which knows nothing of scaling: U is y / rho at all times."""
    settings = replace(TEXTBOOK, rho_start=0.1, rho_end=2.0, ramp=0.8, metric=metric, dual_step=dual_step)
    state = start(settings)
    generator = torch.Generator().manual_seed(2)
    multiplier = {name: {k: torch.zeros_like(v) for k, v in of.items()} for name, of in state.weights.items()}
    for step in range(6):
        progress = (step + 1) / 6
        for (weight,) in pairs(state.weights):  # a training step that wanders
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        rho = state.rho
        assert rho == pytest.approx(admm.rho_at(settings, step / 6))
        state = admm.after_step(state, progress)
        for sub in state.network.present:
            name, y = sub.name, multiplier[sub.name]
            shifted = {k: w + y[k] / rho for k, w in state.weights[name].items()}
            support = on_support(sub, shifted, state.moments[name], state.kept[name], FREE, metric=metric)
            target = project(support, shifted)
            for k, weight in state.weights[name].items():
                y[k] += dual_step * rho * (weight - target[k])
                torch.testing.assert_close(state.rho * state.duals[name][k], y[k], rtol=1e-3, atol=1e-4)
                expected = target[k] - y[k] / state.rho
                torch.testing.assert_close(state.anchors[name][k], expected, rtol=1e-3, atol=1e-4)
    assert state.rho == pytest.approx(2.0)


def test_changing_rho_leaves_the_dual_variable(start: Callable[..., AdmmState]) -> None:
    state = start(replace(TEXTBOOK, rho_start=0.1, rho_end=1.0, ramp=1.0))
    for weight, anchor, dual in pairs(state.weights, state.anchors, state.duals):
        dual.normal_()
        weight.zero_()  # W = 0 and U on the set alone: the Z-step takes U, so that W - Z = -U
        anchor.copy_(-dual)
    before = {name: {k: state.rho * u for k, u in dual.items()} for name, dual in state.duals.items()}
    after = admm.dual_update(state, progress=1.0)
    assert (state.rho, after.rho) == (0.1, pytest.approx(1.0))
    for sub in state.network.present:
        for kind in sub.widths.unit_kinds:
            gone = torch.ones(unit_count(sub.widths, kind), dtype=torch.bool)
            gone[after.kept[sub.name].flat(kind, sub.widths)] = False
            for entry in sub.slices(kind):
                got = (after.rho * after.duals[sub.name][entry]).movedim(entry.axis, 0)
                torch.testing.assert_close(got[gone], before[sub.name][entry].movedim(entry.axis, 0)[gone])
                assert not got[~gone].any()


@pytest.mark.parametrize("metric", METRICS)
def test_coupled_gradient_is_that_of_the_penalty(metric: Metric, start: Callable[..., AdmmState]) -> None:
    state = start(replace(TEXTBOOK, rho_start=0.7, metric=metric))
    for dual, anchor in pairs(state.duals, state.anchors):
        anchor.sub_(dual.normal_())  # Z - U
    model = state.model
    names = dict(model.named_parameters())
    penalty = torch.zeros(())
    for name, weights in state.weights.items():
        for entry, weight in weights.items():
            live = names[entry.parameter].narrow(entry.axis, entry.start, weight.shape[entry.axis])
            penalty = penalty + 0.35 * (live - state.anchors[name][entry]).square().sum()
    base = {n: torch.randn_like(p) for n, p in names.items()}
    expected = torch.autograd.grad(penalty, list(names.values()), allow_unused=True)
    for name, parameter in names.items():
        parameter.grad = base[name].clone()
    admm.add_penalty_gradients(state)
    for (name, parameter), gradient in zip(names.items(), expected, strict=True):
        want = base[name] if gradient is None else base[name] + gradient
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-5)


def test_the_penalty_takes_on_the_scale_of_the_loss(start: Callable[..., AdmmState]) -> None:
    state = start(TEXTBOOK)
    weight = state.model.blocks[0].mlp.fc2.weight
    found = []
    for arguments in ((), (8.0,)):
        weight.grad = torch.zeros_like(weight)
        admm.add_penalty_gradients(state, *arguments)
        found.append(weight.grad)
    assert found[0].any()
    torch.testing.assert_close(found[1], 8 * found[0])


def test_parameters_without_a_gradient_are_left_alone(start: Callable[..., AdmmState]) -> None:
    state = start(TEXTBOOK)
    weight = state.model.blocks[0].mlp.fc2.weight
    admm.add_penalty_gradients(state)
    assert all(p.grad is None for p in state.model.parameters())
    weight.grad = torch.zeros_like(weight)
    admm.add_penalty_gradients(state)
    assert weight.grad.abs().sum() > 0
    assert state.model.blocks[0].mlp.fc1.weight.grad is None


def test_decoupled_pull_moves_weights_by_the_fraction_rho(start: Callable[..., AdmmState]) -> None:
    state = start(AdmmSettings(rho_start=0.2, rho_end=0.2, interval=10))
    before, anchors = copies(state.weights), copies(state.anchors)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    admm.add_penalty_gradients(state)
    assert not any(p.grad.any() for p in state.model.parameters())
    untouched = state.model.blocks[0].mlp.fc1.weight.detach().clone()
    after = admm.after_step(state, progress=0.1)
    assert after.step == 1
    assert after.trace == ()
    for weight, was, anchor in pairs(after.weights, before, anchors):
        torch.testing.assert_close(weight, was + 0.2 * (anchor - was))
    assert torch.equal(state.model.blocks[0].mlp.fc1.weight, untouched)


def test_schedule_of_rho() -> None:
    settings = AdmmSettings(rho_start=0.01, rho_end=0.09, ramp=0.5)
    assert admm.rho_at(settings, 0.0) == pytest.approx(0.01)
    assert admm.rho_at(settings, 0.25) == pytest.approx(0.03)  # geometric
    assert admm.rho_at(settings, 0.5) == pytest.approx(0.09)
    assert admm.rho_at(settings, 1.0) == pytest.approx(0.09)
    assert admm.rho_at(replace(settings, ramp=0.0), 0.0) == pytest.approx(0.09)


@pytest.mark.parametrize(("rho", "interval"), [(0.01, 8), (0.1, 4), (0.1, 8)])
def test_the_critical_dual_step_does_not_drive_weights_through_zero(rho: float, interval: int) -> None:
    """A removed weight under the decoupled pull alone: at the critical step it settles, at the textbook's it swings."""
    settings = AdmmSettings(rho_start=rho, rho_end=rho, interval=interval)

    def lowest(gamma: float) -> float:
        w, u, least = 1.0, 0.0, 0.0
        for step in range(1, 4000):
            w -= rho * (w + u)  # the anchor of a removed unit is -u
            least = min(least, w)
            if step % interval == 0:
                u += gamma * w
        return least

    gamma = admm.critical_dual_step(settings, rho)
    assert gamma == pytest.approx(rho * interval / 4)
    assert lowest(gamma) > -0.15
    assert lowest(1.0) < 2 * lowest(gamma)
    assert lowest(1.0) < -0.2
    assert admm.critical_dual_step(replace(settings, penalty="coupled"), rho) == 1
    assert admm.critical_dual_step(replace(settings, dual_step=0.7), rho) == 0.7
    assert admm.critical_dual_step(replace(settings, interval=1000), rho) == 1


@pytest.mark.parametrize("metric", METRICS)
def test_after_finish_the_weights_lie_on_the_set(
    metric: Metric, start: Callable[..., AdmmState], images: Tensor
) -> None:
    state = start(AdmmSettings(metric=metric))
    kept = admm.finish(state)
    assert kept_widths(kept) == SMALL
    again = {name: project(state.projections[name], values) for name, values in state.weights.items()}
    for weight, projected in pairs(state.weights, again):
        torch.testing.assert_close(weight, projected, rtol=1e-5, atol=1e-6)
    for sub in state.network.present:
        kind, linear = sub.widths.unit_kinds[-1], state.model.get_submodule(sub.readout.module)
        stays = torch.zeros(unit_count(sub.widths, kind), dtype=torch.bool)
        stays[kept[sub.name].flat(kind, sub.widths)] = True
        assert not linear.weight[:, ~stays].any()
        assert bool(linear.weight[:, stays].any(0).all())
    # queries and keys, as far as a kept head can see them
    for sub in state.network.attentions:
        of, qkv = kept[sub.name], state.model.get_submodule(sub.name).qkv.weight
        for part in (0, 32):
            for head, dims in zip(of.heads, of.qk, strict=True):
                gone = [j for j in range(8) if j not in dims]
                rows = qkv[part + head * 8 : part + head * 8 + 8]
                assert not rows[gone].any()
                assert bool(rows[list(dims)].any(1).all())
    # what was removed had nothing left to say
    with torch.no_grad():
        expected = state.model(images)
        got = compact(state.model, kept, images).model(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("metric", METRICS)
def test_a_sublayer_may_be_drawn_to_nothing(
    metric: Metric, model: nn.Module, network: Network, moments: dict[str, SublayerMoments], images: Tensor
) -> None:
    gone = ("blocks.0.mlp", "blocks.1.attn")
    widths = SMALL | {name: absent(SMALL[name]) for name in gone}
    settings = AdmmSettings(metric=metric, interval=1, reselect=1, rho_start=0.3, rho_end=0.3)
    state = admm.start(model, network, widths, moments, None, settings, repair=FREE)
    before = model.blocks[0].mlp.fc2.weight.norm().item()
    state = wander(state, range(6), 6, seed=0, noise=0.001)
    assert model.blocks[0].mlp.fc2.weight.norm().item() < 0.2 * before
    kept = admm.finish(state)
    assert kept_widths(kept) == widths
    assert all(kept[name] == keep_none(SMALL[name]) for name in gone)
    small = compact(model, kept, images).model
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-4)
    assert describe(small).widths == widths


def test_a_sublayer_that_is_absent_already_is_left_alone(model: nn.Module, network: Network, images: Tensor) -> None:
    small = resized(model, network.widths | {"blocks.1.mlp": absent(SMALL["blocks.1.mlp"])})
    narrow = describe(small)
    moments = collect_moments(small, narrow, [images])
    widths = SMALL | {"blocks.1.mlp": absent(SMALL["blocks.1.mlp"])}
    state = admm.start(small, narrow, widths, moments, None, AdmmSettings(interval=1, reselect=1))
    bias = small.blocks[1].mlp.bias.detach().clone()
    state = admm.after_step(state, progress=0.1)
    assert torch.equal(small.blocks[1].mlp.bias, bias)
    assert kept_widths(admm.finish(state)) == widths


def wander(state: AdmmState, steps: range, total: int, seed: int, noise: float = 0.2) -> AdmmState:
    """Steps of a fake training that does the same for the same step."""
    for step in steps:
        generator = torch.Generator().manual_seed(seed + step)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        state = admm.after_step(state, progress=(step + 1) / total)
    return state


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gone", [None, "blocks.1.attn"], ids=["present", "absent"])
def test_a_restored_state_continues_identically(
    metric: Metric,
    gone: str | None,
    model: nn.Module,
    network: Network,
    moments: dict[str, SublayerMoments],
    images: Tensor,
) -> None:
    settings = AdmmSettings(interval=2, reselect=2, rho_start=0.05, metric=metric)
    widths = {name: absent(of) if name == gone else of for name, of in SMALL.items()}

    def fresh(of: nn.Module) -> AdmmState:
        return admm.start(of, network, widths, moments, SCORES, settings)

    state = wander(fresh(model), range(7), 14, seed=100)
    state = admm.refresh(state, collect_moments(model, network, [images]))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "admm": admm.export(state)}, file)
    straight = wander(state, range(7, 14), 14, seed=100)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.load_state_dict({k: torch.randn_like(v) for k, v in saved["model"].items()})
        begun = fresh(twin)  # whatever a fresh start makes of other weights must not shine through
        twin.load_state_dict(saved["model"])
    resumed = admm.restore(begun, saved["admm"])
    assert resumed.kept == state.kept
    resumed = wander(resumed, range(7, 14), 14, seed=100)

    assert resumed.trace == straight.trace
    assert sum(r.flips for r in straight.trace) > 0  # or the support would not have been tested
    assert (resumed.step, resumed.dual_updates, resumed.rho) == (straight.step, straight.dual_updates, straight.rho)
    assert resumed.kept == straight.kept
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert all(torch.equal(*pair) for pair in pairs(resumed.duals, straight.duals))
    assert all(torch.equal(*pair) for pair in pairs(resumed.anchors, straight.anchors))


def test_trace_records_every_z_step(start: Callable[..., AdmmState]) -> None:
    settings = AdmmSettings(
        interval=3, reselect=2, freeze=0.5, hysteresis=0.0, rho_start=0.05, rho_end=0.1, metric="norm"
    )
    state = start(settings)
    assert state.status == "not converged"
    first = state.kept
    state = wander(state, range(18), 18, seed=0, noise=1.0)
    assert [r.step for r in state.trace] == [3, 6, 9, 12, 15, 18]
    assert [r.rho for r in state.trace] == pytest.approx(
        [settings.rho_start] + [admm.rho_at(settings, s / 18) for s in (3, 6, 9, 12, 15)]
    )
    flips = [r.flips for r in state.trace]
    assert [flips[i] for i in (0, 2, 3, 4, 5)] == [0] * 5  # every second Z-step reselects, none after the freeze
    assert flips[1] > 0
    assert flips[1] == admm.count_flips(state.network, first, state.kept)
    assert all(r.primal > 0 and r.dual > 0 for r in state.trace)
    last = state.trace[-1].primal
    assert replace(state, settings=replace(settings, tolerance=2 * last)).status == "converged"
    assert replace(state, settings=replace(settings, tolerance=last / 2)).status == "not converged"


def test_hysteresis_holds_the_support(start: Callable[..., AdmmState]) -> None:
    settings = AdmmSettings(interval=1, reselect=1, freeze=1.0)
    assert sum(r.flips for r in wander(start(settings), range(4), 4, seed=0).trace) > 0
    firm = replace(settings, hysteresis=1e9)
    assert sum(r.flips for r in wander(start(firm), range(4), 4, seed=0).trace) == 0


def test_residuals_are_relative_distances(start: Callable[..., AdmmState]) -> None:
    state = start(TEXTBOOK)
    begun = copies(state.weights)

    def on_set(state: AdmmState) -> list[Tensor]:
        return [anchor + dual for anchor, dual in pairs(state.anchors, state.duals)]

    def norm(values: Iterable[Tensor]) -> float:
        return float(sum(v.double().square().sum() for v in values)) ** 0.5

    first = on_set(state)
    state = wander(state, range(1), 1, seed=3)
    then, size = on_set(state), norm(w for (w,) in pairs(begun))
    gap = [w - z for (w,), z in zip(pairs(state.weights), then, strict=True)]
    move = [z - was for z, was in zip(then, first, strict=True)]
    assert state.trace[-1].primal == pytest.approx(norm(gap) / size, rel=1e-4)
    assert state.trace[-1].dual == pytest.approx(norm(move) / size, rel=1e-4)


def test_refresh_keeps_the_support_and_follows_the_moments(
    start: Callable[..., AdmmState], moments: dict[str, SublayerMoments]
) -> None:
    state = start(AdmmSettings())

    def identity(of: SublayerMoments) -> SublayerMoments:
        return type(of)(*(torch.eye(len(moment), dtype=torch.float64) for moment in tensors_of(of)))

    white = {name: identity(of) for name, of in moments.items()}
    after = admm.refresh(state, white)
    assert after.kept == state.kept
    assert all(after.moments[name] is of for name, of in white.items())
    name, entry = "blocks.0.mlp", state.network.sublayers[1].readout.columns
    weight = state.weights[name][entry]
    kept = list(state.kept[name].units)
    # uncorrelated inputs cannot take over from each other
    torch.testing.assert_close(project(after.projections[name], after.weights[name])[entry][:, kept], weight[:, kept])
    old = project(state.projections[name], state.weights[name])[entry][:, kept]
    assert not torch.allclose(old, weight[:, kept])


def test_a_given_support_is_where_it_begins(
    model: nn.Module, network: Network, moments: dict[str, SublayerMoments]
) -> None:
    chosen = admm.start(model, network, SMALL, moments, SCORES, AdmmSettings(), repair=FREE).kept
    last = tuple(range(64 - 24, 64))
    support = chosen | {"blocks.0.mlp": FfnKept(units=last)}
    state = admm.start(model, network, SMALL, moments, None, AdmmSettings(), repair=FREE, support=support)
    assert state.kept == support
    anchored = state.anchors["blocks.0.mlp"][network.sublayers[1].readout.columns]
    assert anchored.abs().sum(0).nonzero().flatten().tolist() == list(last)


def test_scores_guide_which_heads_stay(model: nn.Module, network: Network, moments: dict[str, SublayerMoments]) -> None:
    guided = RepairSettings(guidance=1.0)
    kept = admm.start(model, network, SMALL, moments, SCORES, AdmmSettings(), repair=guided).kept
    assert [kept[name].heads for name in SCORES] == [(0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        (AdmmSettings(), 160),
        (AdmmSettings(metric="activation"), 240),
        (AdmmSettings(penalty="coupled", rho_start=0.1, rho_end=30), 160),
        (AdmmSettings(penalty="coupled", rho_start=0.1, rho_end=30, metric="norm"), 160),
    ],
    ids=["decoupled-data", "decoupled-activation", "coupled-data", "coupled-norm"],
)
def test_the_loop_of_the_docstring_converges(
    settings: AdmmSettings, length: int, make_model: Callable[..., Any], images: Tensor
) -> None:
    model = make_model(mlp_ratio=1, depth=1)
    network = describe(model)
    widths = {"blocks.0.attn": PARTS["attn"], "blocks.0.mlp": FfnWidths(units=16)}
    moments = collect_moments(model, network, [images])
    scores = {"blocks.0.attn": (0.25,) * 4}
    loader = [(images[i::4], torch.arange(32)[i::4] % 5) for i in range(4)] * (length // 4)
    # the penalty's gradient is stiff at its end: plain SGD keeps below 2 / rho where Adam would jitter
    coupled = settings.penalty == "coupled"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02) if coupled else torch.optim.AdamW(model.parameters(), 1e-3)

    state = admm.start(model, network, widths, moments, scores, settings)
    for step, (batch, labels) in enumerate(loader):
        F.cross_entropy(model(batch), labels).backward()
        admm.add_penalty_gradients(state)
        optimizer.step()
        optimizer.zero_grad()
        state = admm.after_step(state, progress=(step + 1) / len(loader))
    assert state.status == "converged", state.trace[-1]
    assert state.trace[-1].primal < 0.1 * state.trace[0].primal
    with torch.no_grad():
        before = model(images)
        kept = admm.finish(state)
        after = model(images)
    assert kept_widths(kept) == widths
    assert (before - after).abs().max() < 0.1 * before.abs().max()  # there was little left to lose


def test_widths_that_do_not_fit_are_refused(
    model: nn.Module, network: Network, moments: dict[str, SublayerMoments]
) -> None:
    wide = SMALL | {"blocks.1.attn": replace(PARTS["attn"], heads=9)}
    with pytest.raises(PlanError, match=r"'blocks\.1\.attn': 'heads' must be from 1 to 4, got 9"):
        admm.start(model, network, wide, moments, None, AdmmSettings())


@pytest.mark.parametrize(
    "setting",
    [
        {"rho_start": 0.0},
        {"rho_start": 0.5, "rho_end": 0.1},
        {"rho_end": 1.5},
        {"interval": 0},
        {"reselect": 0},
        {"dual_step": 0.0},
        {"ramp": 1.5},
        {"freeze": -0.1},
        {"hysteresis": -1.0},
        {"tolerance": 0.0},
        {"metric": "euclidean"},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"admm.*{next(iter(setting))}"):
        AdmmSettings(**setting)
