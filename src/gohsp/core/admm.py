"""ADMM with structured constraints: soft pruning while the network trains (``docs/admm.md``).

    minimise  L(W)   subject to   W in S          (S: the structured sparsity set of given widths, see `projection`)

Scaled form, with penalty ``rho``; every function here is one line of it:

    W-step   the caller's optimiser steps on L, plus a pull of W towards the *anchor* Z - U
    Z-step   Z <- projection of W + U on S
    U-step   U <- U + gamma (W - Z)

In a training loop of your own::

    state = admm.start(model, network, widths, moments, scores, settings)
    for step, (images, labels) in enumerate(loader):
        loss(model(images), labels).backward()
        admm.add_penalty_gradients(state)        # does nothing unless the penalty is coupled
        optimizer.step(); optimizer.zero_grad()
        state = admm.after_step(state, progress=(step + 1) / len(loader))
    kept = admm.finish(state)                    # weights now lie on the set; hand this to compact()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from gohsp.core.moments import Moments, SublayerMoments, tensors_of
from gohsp.core.projection import (
    HeadScores,
    Metric,
    RepairSettings,
    SublayerProjection,
    Values,
    constrained,
    on_support,
    project,
    select_all,
    squared_size,
)
from gohsp.errors import ConfigError
from gohsp.settings import NOT_NEGATIVE, POSITIVE, SHARE, Range, require_settings, whole
from gohsp.structure import (
    Kept,
    Network,
    SublayerKept,
    Widths,
    check_widths,
    keep_none,
    kept_from_json,
    kept_to_json,
)

Penalty = Literal["decoupled", "coupled"]
Status = Literal["converged", "not converged"]

PROBES = 32
"""Random sums of rows from which a Z-step's residuals are estimated; exact norms would cost twice its projection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmmSettings:
    """How the penalty acts and grows.

    Attributes:
        metric: Of the projection: the ``data``'s, or that of the weights, units being compared by their ``activation``
            or by their ``norm`` (:mod:`gohsp.core.projection`).
        penalty: ``decoupled`` moves W by the fraction ``rho`` of its distance to the anchor after each optimiser
            step, as AdamW decays weights; ``coupled`` adds ``rho (W - Z + U)`` to the gradients before it.
        rho_start: Penalty at the start.
        rho_end: Penalty at the end; in between it grows geometrically.
        ramp: Share of the stage after which ``rho_end`` is reached.
        interval: Optimiser steps between two Z-steps.
        dual_step: Step gamma of the dual variable, above 0 and at most 1 (textbook ADMM). None takes 1 when the
            penalty is coupled, and :func:`critical_dual_step` when it is decoupled.
        reselect: Z-steps between two fresh selections of the support; in between only its weights move.
        freeze: Share of the stage after which the support is final.
        hysteresis: Units of the present support count ``1 + hysteresis`` fold when it is selected afresh, so that
            masks do not flip for nothing.
        tolerance: Relative primal residual below which the stage has converged.
    """

    metric: Metric = "data"
    penalty: Penalty = "decoupled"
    rho_start: float = 0.01
    rho_end: float = 0.1
    ramp: float = 0.6
    interval: int = 8
    dual_step: float | None = None
    reselect: int = 12
    freeze: float = 0.6
    hysteresis: float = 0.3
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        require_settings(
            self,
            "admm",
            rho_start=POSITIVE,
            rho_end=POSITIVE,
            ramp=SHARE,
            interval=whole(),
            dual_step=Range(0, 1, above=True),
            reselect=whole(),
            freeze=SHARE,
            hysteresis=NOT_NEGATIVE,
            tolerance=POSITIVE,
        )
        if self.rho_start > self.rho_end:
            raise ConfigError(f"admm.rho_start must be at most admm.rho_end, got {self.rho_start} and {self.rho_end}")
        if self.penalty == "decoupled" and self.rho_end > 1:
            raise ConfigError(
                f"admm.rho_end is a fraction when the penalty is decoupled, at most 1; got {self.rho_end}"
            )


@dataclass(frozen=True, slots=True)
class Residuals:
    """One Z-step's record.

    Attributes:
        step: Optimiser steps done.
        rho: Penalty in force.
        primal: ``||W - Z|| / ||W_0||``, in the metric of the projection; ``W_0`` are the weights at the start.
        dual: ``||Z - Z_before|| / ||W_0||``, likewise.
        flips: Units that entered or left the support.
    """

    step: int
    rho: float
    primal: float
    dual: float
    flips: int


@dataclass(frozen=True, kw_only=True)
class AdmmState:
    """Everything between two steps; tensors by the names of sub-layers.

    ``anchors`` (Z - U) and ``duals`` (U) are updated in place; ``weights`` are views of the model's parameters,
    so the model must stay on its device while a state is in use. ``norms`` are the moments in float32, which
    is enough for residuals; ``reference`` is the squared norm of the weights at the start.
    """

    model: nn.Module
    network: Network
    widths: Widths
    moments: Moments
    scores: HeadScores | None
    settings: AdmmSettings
    repair: RepairSettings
    weights: Mapping[str, Values]
    anchors: Mapping[str, Values]
    duals: Mapping[str, Values]
    projections: Mapping[str, SublayerProjection]
    norms: Moments
    reference: float
    rho: float
    step: int = 0
    dual_updates: int = 0
    trace: tuple[Residuals, ...] = ()

    @property
    def kept(self) -> dict[str, SublayerKept]:
        """The present support."""
        gone = {sub.name: keep_none(sub.widths) for sub in self.network.sublayers if sub.name not in self.projections}
        return {name: projection.kept for name, projection in self.projections.items()} | gone

    @property
    def status(self) -> Status:
        """Whether the last relative primal residual is below the tolerance."""
        met = bool(self.trace) and self.trace[-1].primal < self.settings.tolerance
        return "converged" if met else "not converged"


def start(
    model: nn.Module,
    network: Network,
    widths: Widths,
    moments: Moments,
    scores: HeadScores | None,
    settings: AdmmSettings,
    *,
    repair: RepairSettings | None = None,
    support: Kept | None = None,
) -> AdmmState:
    """Begin with ``Z`` the projection of the present weights and ``U`` zero.

    Args:
        model: The model being trained; its parameters are read and pulled in place.
        network: Its description.
        widths: Widths to reach.
        moments: Second moments of its sub-layers.
        scores: Head scores of the graph ranking, or None for no guidance.
        settings: Penalty, schedule, metric.
        repair: Guidance and ridge; None for the defaults.
        support: The units to begin with, where they are chosen already; None selects them.

    Raises:
        PlanError: ``widths`` do not fit the network.
    """
    check_widths(network, widths)
    weights = {sub.name: constrained(model, sub, settings.metric) for sub in network.present}
    state = AdmmState(
        model=model,
        network=network,
        widths=dict(widths),
        moments=dict(moments),
        scores=scores,
        settings=settings,
        repair=repair or RepairSettings(),
        weights=weights,
        anchors={},
        duals={name: {k: torch.zeros_like(v) for k, v in values.items()} for name, values in weights.items()},
        projections={},
        norms=_single(moments),
        reference=0.0,
        rho=settings.rho_start,
    )
    projections = _projections(state, weights, support or _selected(state, weights, None))
    anchors = {name: project(projections[name], values) for name, values in weights.items()}
    reference = sum(_size(state, name, values) for name, values in weights.items())
    return replace(state, projections=projections, anchors=anchors, reference=reference)


def _single(moments: Moments) -> dict[str, SublayerMoments]:
    return {name: type(of)(*(moment.float() for moment in tensors_of(of))) for name, of in moments.items()}


def _size(state: AdmmState, name: str, values: Values, *, probes: int | None = None) -> float:
    """Squared norm of a sub-layer's tensors in the state's metric."""
    sub = next(sub for sub in state.network.present if sub.name == name)
    return squared_size(sub, values, state.norms[name], state.settings.metric, probes=probes)


def _selected(state: AdmmState, values: Mapping[str, Values], present: Kept | None) -> dict[str, SublayerKept]:
    return select_all(
        state.model,
        state.network,
        values,
        state.moments,
        state.widths,
        state.repair,
        metric=state.settings.metric,
        scores=state.scores,
        present=present,
        hysteresis=state.settings.hysteresis,
    )


def _projections(state: AdmmState, values: Mapping[str, Values], kept: Kept) -> dict[str, SublayerProjection]:
    return {
        sub.name: on_support(
            sub,
            values[sub.name],
            state.moments[sub.name],
            kept[sub.name],
            state.repair,
            metric=state.settings.metric,
        )
        for sub in state.network.present
    }


def add_penalty_gradients(state: AdmmState, loss_scale: float = 1.0) -> None:
    """Add ``rho (W - Z + U)`` to the gradients; call between ``backward`` and the optimiser's step.

    Does nothing when the penalty is decoupled. Parameters without a gradient are left alone.

    Args:
        state: The state.
        loss_scale: What the gradients are still multiplied by, where a loss scaler is at work (float16).
    """
    if state.settings.penalty == "decoupled":
        return
    gradients, weights, anchors = [], [], []
    for name, values in state.weights.items():
        for entry, weight in values.items():
            gradient = state.model.get_parameter(entry.parameter).grad
            if gradient is not None:
                gradients.append(gradient.narrow(entry.axis, entry.start, weight.shape[entry.axis]))
                weights.append(weight)
                anchors.append(state.anchors[name][entry])
    if gradients:
        torch._foreach_add_(gradients, weights, alpha=loss_scale * state.rho)
        torch._foreach_add_(gradients, anchors, alpha=-loss_scale * state.rho)


def after_step(state: AdmmState, progress: float) -> AdmmState:
    """Do what is due after an optimiser step: the decoupled pull, and every ``interval`` steps Z- and U-step.

    Args:
        state: The state before.
        progress: Share of the stage that is over, 0 to 1; drives the schedule.

    Returns:
        The state after; use it instead of ``state`` from here on.
    """
    if state.settings.penalty == "decoupled":
        weights = [w for values in state.weights.values() for w in values.values()]
        anchors = [state.anchors[name][k] for name, values in state.weights.items() for k in values]
        torch._foreach_lerp_(weights, anchors, state.rho)
    state = replace(state, step=state.step + 1)
    return dual_update(state, progress) if state.step % state.settings.interval == 0 else state


def rho_at(settings: AdmmSettings, progress: float) -> float:
    """Penalty when the share ``progress`` of the stage is over."""
    share = min(progress / settings.ramp, 1.0) if settings.ramp > 0 else 1.0
    return settings.rho_start * (settings.rho_end / settings.rho_start) ** share


def critical_dual_step(settings: AdmmSettings, rho: float) -> float:
    """The dual step: as set, or the largest that does not make pull and dual overshoot.

    A decoupled pull moves a removed weight ``w`` by ``-rho (w + u)`` a step, and its dual by ``gamma w`` every
    ``interval`` steps: a damped oscillator with damping ratio ``sqrt(rho interval / gamma) / 2``. At
    ``gamma = rho interval / 4`` it is critically damped. Textbook ADMM (``gamma = 1``) assumes an exact W-step
    between dual steps; with a gentle pull it winds the dual up and drives removed weights far through zero.
    """
    if settings.dual_step is not None:
        return settings.dual_step
    return 1.0 if settings.penalty == "coupled" else min(1.0, rho * settings.interval / 4)


@torch.no_grad()
def dual_update(state: AdmmState, progress: float) -> AdmmState:
    """Z-step, U-step and the next ``rho``; ``U`` is rescaled with it, so that the dual variable ``rho U`` stays."""
    settings = state.settings
    shifted = {name: {k: w + state.duals[name][k] for k, w in values.items()} for name, values in state.weights.items()}
    projections, flips = state.projections, 0
    if progress <= settings.freeze and (state.dual_updates + 1) % settings.reselect == 0:
        projections = _projections(state, shifted, _selected(state, shifted, state.kept))
        flips = count_flips(state.network, state.kept, {name: p.kept for name, p in projections.items()})
    rho, gamma = rho_at(settings, progress), critical_dual_step(settings, state.rho)
    primal = dual_size = 0.0
    for name, weight in state.weights.items():
        anchor, dual = state.anchors[name], state.duals[name]
        z = project(projections[name], shifted[name])
        gap = {k: weight[k] - z[k] for k in weight}
        move = {k: z[k] - anchor[k] - dual[k] for k in weight}
        primal += _size(state, name, gap, probes=PROBES)
        dual_size += _size(state, name, move, probes=PROBES)
        for k in weight:
            dual[k].add_(gap[k], alpha=gamma).mul_(state.rho / rho)
            torch.sub(z[k], dual[k], out=anchor[k])
    scale = max(state.reference, 1e-30)
    record = Residuals(
        step=state.step, rho=state.rho, primal=(primal / scale) ** 0.5, dual=(dual_size / scale) ** 0.5, flips=flips
    )
    return replace(
        state,
        projections=projections,
        rho=rho,
        dual_updates=state.dual_updates + 1,
        trace=(*state.trace, record),
    )


def count_flips(network: Network, before: Kept, after: Kept) -> int:
    """Units of all kinds that are kept in one cut and not in the other."""
    flips = 0
    for sub in network.present:
        for kind in sub.widths.unit_kinds:
            a, b = (of[sub.name].flat(kind, sub.widths) for of in (before, after))
            flips += len(set(a) ^ set(b))
    return flips


def refresh(state: AdmmState, moments: Moments) -> AdmmState:
    """Take over second moments measured anew; the support stays, its refit follows them."""
    state = replace(state, moments=dict(moments), norms=_single(moments))
    return replace(state, projections=_projections(state, state.weights, state.kept))


@torch.no_grad()
def finish(state: AdmmState) -> dict[str, SublayerKept]:
    """Final projection: put the weights themselves on the set, in place.

    Returns:
        What stays, ready for compaction.
    """
    for name, values in state.weights.items():
        for entry, target in project(state.projections[name], values).items():
            values[entry].copy_(target)
    return state.kept


def export(state: AdmmState) -> dict[str, Any]:
    """What :func:`restore` needs, as tensors and plain data."""
    return {
        "anchors": {name: list(values.values()) for name, values in state.anchors.items()},
        "duals": {name: list(values.values()) for name, values in state.duals.items()},
        "moments": {name: list(tensors_of(of)) for name, of in state.moments.items()},
        "kept": kept_to_json(state.kept),
        "reference": state.reference,
        "rho": state.rho,
        "step": state.step,
        "dual_updates": state.dual_updates,
        "trace": [asdict(r) for r in state.trace],
    }


def restore(state: AdmmState, exported: Mapping[str, Any]) -> AdmmState:
    """Continue from what :func:`export` returned; ``state`` is a fresh one of the same model and settings."""
    for mine, theirs in ((state.anchors, exported["anchors"]), (state.duals, exported["duals"])):
        for name, values in mine.items():
            for value, tensor in zip(values.values(), theirs[name], strict=True):
                value.copy_(tensor)
    kept = kept_from_json(exported["kept"])
    state = replace(
        state,
        projections={name: replace(p, kept=kept[name]) for name, p in state.projections.items()},
        reference=exported["reference"],
        rho=exported["rho"],
        step=exported["step"],
        dual_updates=exported["dual_updates"],
        trace=tuple(Residuals(**r) for r in exported["trace"]),
    )
    return refresh(state, {name: type(state.moments[name])(*of) for name, of in exported["moments"].items()})
