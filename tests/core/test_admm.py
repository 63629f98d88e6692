from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.core import admm
from gohsp.core.admm import AdmmSettings, AdmmState
from gohsp.core.compensation import BlockMoments, collect_moments, tensors_of
from gohsp.core.projection import ProjectionSettings, on_support, project
from gohsp.errors import PlanError, ConfigError
from gohsp.models import compact, describe
from gohsp.structure import BlockShape, ModelStructure, Plan

EUCLIDEAN = ProjectionSettings(metric="euclidean", strength="norm", guidance=0)
DATA = ProjectionSettings(metric="data", guidance=0)
SMALL = BlockShape(heads=2, qk=4, vo=4, ffn=24)
TEXTBOOK = AdmmSettings(
    penalty="coupled",
    rho_start=1.0,
    rho_end=1.0,
    interval=1,
    reselect=1,
    freeze=1.0,
    hysteresis=0.0,
    tolerance=1e-5,
    projection=EUCLIDEAN,
)


@pytest.fixture
def start(
    model: nn.Module, structure: ModelStructure, moments: tuple[BlockMoments, ...]
) -> Callable[[AdmmSettings], AdmmState]:
    return lambda settings: admm.start(model, structure, (SMALL, SMALL), moments, None, settings)


def copies(values: tuple[dict, ...]) -> list[dict]:
    return [{k: v.clone() for k, v in block.items()} for block in values]


def towards(state: AdmmState, targets: list[dict]) -> None:
    """Gradient of ``1/2 ||W - T||^2`` on every constrained tensor, none elsewhere."""
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for weights, target in zip(state.weights, targets, strict=True):
        for entry, weight in weights.items():
            grad = state.model.get_parameter(entry.parameter).grad
            grad.narrow(entry.axis, entry.start, weight.shape[entry.axis]).copy_(weight - target[entry])


def test_a_quadratic_loss_ends_at_the_projection_of_its_minimum(start: Callable[..., AdmmState]) -> None:
    """min 1/2 ||W - T||^2 on the set is the projection of T; its multiplier rho U is T - W where W is held at 0."""
    state = start(TEXTBOOK)
    targets = copies(state.weights)
    generator = torch.Generator().manual_seed(5)
    strong = state.plan
    for block, target, plan in zip(state.structure.blocks, targets, strong.blocks, strict=True):
        for kind in ("qk", "vo", "ffn"):  # a clear-cut minimum: what the first support keeps is large
            keep = plan.units(kind, block.shape)
            for entry in block.slices(kind):
                noise = torch.randn(target[entry].shape, generator=generator)
                noise.movedim(entry.axis, 0)[keep] *= 10
                target[entry] = noise
    for _ in range(40):
        towards(state, targets)
        admm.add_penalty_gradients(state)
        torch.optim.SGD(state.model.parameters(), lr=1 / (1 + state.rho)).step()  # the W-step's exact minimum
        state = admm.after_step(state, progress=0.5)

    assert state.plan == strong
    assert state.status == "converged"
    assert state.trace[-1].primal < 1e-6
    assert state.trace[-1].dual < 1e-6
    assert state.trace[5].primal > state.trace[10].primal > state.trace[20].primal
    for i, block in enumerate(state.structure.blocks):
        projection = on_support(block, targets[i], state.moments[i], strong.blocks[i], EUCLIDEAN)
        for entry, expected in project(projection, targets[i]).items():
            torch.testing.assert_close(state.weights[i][entry], expected, rtol=1e-4, atol=1e-4)
            multiplier = state.rho * state.duals[i][entry]
            torch.testing.assert_close(multiplier, targets[i][entry] - expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("projection", [EUCLIDEAN, DATA], ids=["euclidean", "data"])
@pytest.mark.parametrize("dual_step", [1.0, 0.3])
def test_steps_follow_the_unscaled_algorithm_while_rho_grows(
    projection: ProjectionSettings, dual_step: float, start: Callable[..., AdmmState]
) -> None:
    """Against ADMM with a plain multiplier ``y``, which knows nothing of scaling: U is y / rho at all times."""
    settings = replace(TEXTBOOK, rho_start=0.1, rho_end=2.0, ramp=0.8, projection=projection, dual_step=dual_step)
    state = start(settings)
    generator = torch.Generator().manual_seed(2)
    multiplier = [{k: torch.zeros_like(v) for k, v in block.items()} for block in state.weights]
    for step in range(6):
        progress = (step + 1) / 6
        for block in state.weights:  # a training step that wanders
            for weight in block.values():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        rho = state.rho
        assert rho == pytest.approx(admm.rho_at(settings, step / 6))
        state = admm.after_step(state, progress)
        for i, block in enumerate(state.structure.blocks):
            shifted = {k: w + multiplier[i][k] / rho for k, w in state.weights[i].items()}
            target = project(on_support(block, shifted, state.moments[i], state.plan.blocks[i], projection), shifted)
            for k, weight in state.weights[i].items():
                multiplier[i][k] += dual_step * rho * (weight - target[k])
                torch.testing.assert_close(state.rho * state.duals[i][k], multiplier[i][k], rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(
                    state.anchors[i][k], target[k] - multiplier[i][k] / state.rho, rtol=1e-3, atol=1e-4
                )
    assert state.rho == pytest.approx(2.0)


def test_changing_rho_leaves_the_dual_variable(start: Callable[..., AdmmState]) -> None:
    state = start(replace(TEXTBOOK, rho_start=0.1, rho_end=1.0, ramp=1.0))
    for dual in state.duals:
        for value in dual.values():
            value.normal_()
    before = [{k: state.rho * u for k, u in dual.items()} for dual in state.duals]
    for values, anchors, dual in zip(state.weights, state.anchors, state.duals, strict=True):
        for k, value in values.items():  # W = 0 and U on the set alone: the Z-step takes U, so that W - Z = -U
            value.zero_()
            anchors[k].copy_(-dual[k])
    after = admm.dual_update(state, progress=1.0)
    assert (state.rho, after.rho) == (0.1, pytest.approx(1.0))
    for i, block in enumerate(state.structure.blocks):
        for kind in ("qk", "vo", "ffn"):
            gone = torch.ones({"qk": 32, "vo": 32, "ffn": 64}[kind], dtype=torch.bool)
            gone[after.plan.blocks[i].units(kind, block.shape)] = False
            for entry in block.slices(kind):
                got = (after.rho * after.duals[i][entry]).movedim(entry.axis, 0)
                torch.testing.assert_close(got[gone], before[i][entry].movedim(entry.axis, 0)[gone])
                assert not got[~gone].any()


@pytest.mark.parametrize("projection", [EUCLIDEAN, DATA], ids=["euclidean", "data"])
def test_coupled_gradient_is_that_of_the_penalty(
    projection: ProjectionSettings, start: Callable[..., AdmmState]
) -> None:
    state = start(replace(TEXTBOOK, rho_start=0.7, projection=projection))
    for dual, anchors in zip(state.duals, state.anchors, strict=True):
        for k in dual:
            dual[k].normal_()
            anchors[k].sub_(dual[k])  # Z - U
    model = state.model
    names = dict(model.named_parameters())
    penalty = torch.zeros(())
    for weights, anchors in zip(state.weights, state.anchors, strict=True):
        for entry, weight in weights.items():
            live = names[entry.parameter].narrow(entry.axis, entry.start, weight.shape[entry.axis])
            penalty = penalty + 0.35 * (live - anchors[entry]).square().sum()
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
    state = start(AdmmSettings(rho_start=0.2, rho_end=0.2, interval=10, projection=DATA))
    before, anchors = copies(state.weights), copies(state.anchors)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    admm.add_penalty_gradients(state)
    assert not any(p.grad.any() for p in state.model.parameters())
    untouched = state.model.blocks[0].mlp.fc1.weight.detach().clone()
    after = admm.after_step(state, progress=0.1)
    assert after.step == 1
    assert after.trace == ()
    for i, values in enumerate(after.weights):
        for k, value in values.items():
            torch.testing.assert_close(value, before[i][k] + 0.2 * (anchors[i][k] - before[i][k]))
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


@pytest.mark.parametrize("projection", [EUCLIDEAN, DATA], ids=["euclidean", "data"])
def test_after_finish_the_weights_lie_on_the_set(
    projection: ProjectionSettings, start: Callable[..., AdmmState], images: Tensor
) -> None:
    state = start(AdmmSettings(projection=projection))
    shapes = tuple(state.shapes)
    plan = admm.finish(state)
    assert plan.shapes == shapes
    again = {k: v for b, p in zip(state.weights, state.projections, strict=True) for k, v in project(p, b).items()}
    for values in state.weights:
        for k, value in values.items():
            torch.testing.assert_close(value, again[k], rtol=1e-5, atol=1e-6)
    for block, kept in zip(state.model.blocks, plan.blocks, strict=True):
        for linear, kind, count in ((block.attn.proj, "vo", 32), (block.mlp.fc2, "ffn", 64)):
            stays = torch.zeros(count, dtype=torch.bool)
            stays[kept.units(kind, BlockShape(heads=4, qk=8, vo=8, ffn=64))] = True
            assert not linear.weight[:, ~stays].any()
            assert bool(linear.weight[:, stays].any(0).all())
        # queries and keys, as far as a kept head can see them
        for part in (0, 32):
            for head, dims in zip(kept.heads, kept.qk, strict=True):
                gone = [j for j in range(8) if j not in dims]
                rows = block.attn.qkv.weight[part + head * 8 : part + head * 8 + 8]
                assert not rows[gone].any()
                assert bool(rows[list(dims)].any(1).all())
    # what was removed had nothing left to say
    with torch.no_grad():
        expected = state.model(images)
        got = compact(state.model, plan, images).model(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def wander(state: AdmmState, steps: range, total: int, seed: int, noise: float = 0.2) -> AdmmState:
    """Steps of a fake training that does the same for the same step."""
    for step in steps:
        generator = torch.Generator().manual_seed(seed + step)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        state = admm.after_step(state, progress=(step + 1) / total)
    return state


@pytest.mark.parametrize("projection", [replace(EUCLIDEAN, guidance=0.5), replace(DATA, guidance=0.5)])
def test_a_restored_state_continues_identically(
    projection: ProjectionSettings, model: nn.Module, structure: ModelStructure, moments: tuple, images: Tensor
) -> None:
    settings = AdmmSettings(interval=2, reselect=2, rho_start=0.05, projection=projection)
    scores = [[0.1, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]]

    def fresh(of: nn.Module) -> AdmmState:
        return admm.start(of, structure, (SMALL, SMALL), moments, scores, settings)

    state = wander(fresh(model), range(7), 14, seed=100)
    state = admm.refresh(state, collect_moments(model, structure, [images]))
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
    assert resumed.plan == state.plan
    resumed = wander(resumed, range(7, 14), 14, seed=100)

    assert resumed.trace == straight.trace
    assert sum(r.flips for r in straight.trace) > 0  # or the plan would not have been tested
    assert (resumed.step, resumed.dual_updates, resumed.rho) == (straight.step, straight.dual_updates, straight.rho)
    assert resumed.plan == straight.plan
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    for mine, theirs in zip((*resumed.duals, *resumed.anchors), (*straight.duals, *straight.anchors), strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_trace_records_every_z_step(start: Callable[..., AdmmState]) -> None:
    settings = AdmmSettings(
        interval=3, reselect=2, freeze=0.5, hysteresis=0.0, rho_start=0.05, rho_end=0.1, projection=EUCLIDEAN
    )
    state = start(settings)
    assert state.status == "not converged"
    first = state.plan
    state = wander(state, range(18), 18, seed=0, noise=1.0)
    assert [r.step for r in state.trace] == [3, 6, 9, 12, 15, 18]
    assert [r.rho for r in state.trace] == pytest.approx(
        [settings.rho_start] + [admm.rho_at(settings, s / 18) for s in (3, 6, 9, 12, 15)]
    )
    flips = [r.flips for r in state.trace]
    assert [flips[i] for i in (0, 2, 3, 4, 5)] == [0] * 5  # every second Z-step reselects, none after the freeze
    assert flips[1] > 0
    assert flips[1] == admm.count_flips(state.structure, first, state.plan)
    assert all(r.primal > 0 and r.dual > 0 for r in state.trace)
    last = state.trace[-1].primal
    assert replace(state, settings=replace(settings, tolerance=2 * last)).status == "converged"
    assert replace(state, settings=replace(settings, tolerance=last / 2)).status == "not converged"


def test_hysteresis_holds_the_support(start: Callable[..., AdmmState]) -> None:
    settings = AdmmSettings(interval=1, reselect=1, freeze=1.0, projection=DATA)
    assert sum(r.flips for r in wander(start(settings), range(4), 4, seed=0).trace) > 0
    firm = replace(settings, hysteresis=1e9)
    assert sum(r.flips for r in wander(start(firm), range(4), 4, seed=0).trace) == 0


def test_residuals_are_relative_distances(start: Callable[..., AdmmState]) -> None:
    state = start(replace(TEXTBOOK, projection=EUCLIDEAN))
    begun = copies(state.weights)
    first = [{k: a + state.duals[i][k] for k, a in block.items()} for i, block in enumerate(state.anchors)]
    state = wander(state, range(1), 1, seed=3)
    z = [{k: a + state.duals[i][k] for k, a in block.items()} for i, block in enumerate(state.anchors)]

    def norm(values: list[dict]) -> float:
        return float(sum(v.double().square().sum() for b in values for v in b.values())) ** 0.5

    gap = [{k: w - z[i][k] for k, w in block.items()} for i, block in enumerate(state.weights)]
    move = [{k: value - first[i][k] for k, value in block.items()} for i, block in enumerate(z)]
    size = norm(begun)
    assert state.trace[-1].primal == pytest.approx(norm(gap) / size, rel=1e-4)
    assert state.trace[-1].dual == pytest.approx(norm(move) / size, rel=1e-4)


def test_refresh_keeps_the_support_and_follows_the_moments(
    start: Callable[..., AdmmState], moments: tuple[BlockMoments, ...]
) -> None:
    state = start(AdmmSettings(projection=DATA))
    white = tuple(BlockMoments(*(torch.eye(len(m), dtype=torch.float64) for m in tensors_of(b))) for b in moments)
    after = admm.refresh(state, white)
    assert after.plan == state.plan
    assert all(a is b for a, b in zip(after.moments, white, strict=True))
    readout = state.structure.blocks[0].ffn_readout
    weight = state.weights[0][readout.columns]
    kept = list(state.plan.blocks[0].ffn)
    # uncorrelated inputs cannot take over from each other
    torch.testing.assert_close(
        project(after.projections[0], after.weights[0])[readout.columns][:, kept], weight[:, kept]
    )
    old = project(state.projections[0], state.weights[0])[readout.columns][:, kept]
    assert not torch.allclose(old, weight[:, kept])


def test_a_given_support_is_where_it_begins(model: nn.Module, structure: ModelStructure, moments: tuple) -> None:
    settings = AdmmSettings(projection=DATA)
    chosen = admm.start(model, structure, (SMALL, SMALL), moments, [[4.0, 1, 2, 3], [1, 4, 3, 2.0]], settings).plan
    last = tuple(range(structure.blocks[0].shape.ffn - SMALL.ffn, structure.blocks[0].shape.ffn))
    support = Plan((replace(chosen.blocks[0], ffn=last), chosen.blocks[1]))
    state = admm.start(model, structure, (SMALL, SMALL), moments, None, settings, support=support)
    assert state.plan == support
    anchored = state.anchors[0][structure.blocks[0].ffn_readout.columns]
    assert anchored.abs().sum(0).nonzero().flatten().tolist() == list(last)


def test_scores_guide_which_heads_stay(model: nn.Module, structure: ModelStructure, moments: tuple) -> None:
    settings = AdmmSettings(projection=replace(DATA, guidance=1.0))
    state = admm.start(model, structure, (SMALL, SMALL), moments, [[4.0, 1, 2, 3], [1, 4, 3, 2.0]], settings)
    assert [b.heads for b in state.plan.blocks] == [(0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        (AdmmSettings(projection=ProjectionSettings()), 160),
        (AdmmSettings(projection=replace(EUCLIDEAN, strength="activation")), 240),
        (AdmmSettings(penalty="coupled", rho_start=0.1, rho_end=30, projection=ProjectionSettings()), 160),
        (AdmmSettings(penalty="coupled", rho_start=0.1, rho_end=30, projection=EUCLIDEAN), 160),
    ],
    ids=["decoupled-data", "decoupled-euclidean", "coupled-data", "coupled-euclidean"],
)
def test_the_loop_of_the_docstring_converges(
    settings: AdmmSettings, length: int, make_model: Callable[..., Any], images: Tensor
) -> None:
    model = make_model(mlp_ratio=1, depth=1)
    structure = describe(model)
    shapes = (BlockShape(heads=2, qk=4, vo=4, ffn=16),)
    moments = collect_moments(model, structure, [images])
    scores = [[0.25] * 4]
    loader = [(images[i::4], torch.arange(32)[i::4] % 5) for i in range(4)] * (length // 4)
    # the penalty's gradient is stiff at its end: plain SGD keeps below 2 / rho where Adam would jitter
    coupled = settings.penalty == "coupled"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02) if coupled else torch.optim.AdamW(model.parameters(), 1e-3)

    state = admm.start(model, structure, shapes, moments, scores, settings)
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
        plan = admm.finish(state)
        after = model(images)
    assert plan.shapes == shapes
    assert (before - after).abs().max() < 0.1 * before.abs().max()  # there was little left to lose


def test_shapes_that_do_not_fit_are_refused(model: nn.Module, structure: ModelStructure, moments: tuple) -> None:
    with pytest.raises(PlanError, match=r"block 1: 'heads' must be from 1 to 4, got 9"):
        admm.start(model, structure, (SMALL, replace(SMALL, heads=9)), moments, None, AdmmSettings())


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
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"admm.*{next(iter(setting))}"):
        AdmmSettings(**setting)
