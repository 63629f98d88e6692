"""Markov chains on a graph of heads: transition matrix and stationary distribution (``docs/ranking.md``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gohsp.errors import ConfigError, NonFiniteError


@dataclass(frozen=True, kw_only=True, slots=True)
class StationaryDistribution:
    """A chain's stationary distribution and how it was reached.

    Attributes:
        pi: Probabilities ``[nodes]``, float64, summing to 1.
        iterations: Power iterations done.
        residual: L1 norm of ``pi G - pi``, with ``G`` the damped chain.
        converged: Whether the residual is within the tolerance.
        irreducible: Whether the undamped chain reaches every node from every node. Where it does not, ``pi``
            is unique by damping alone.
    """

    pi: Tensor
    iterations: int
    residual: float
    converged: bool
    irreducible: bool


def isolated_nodes(edges: Tensor) -> list[int]:
    """Nodes without an outgoing edge: the walk has nowhere to go from there."""
    return (edges.sum(dim=1) == 0).nonzero().flatten().tolist()


def transition_matrix(edges: Tensor) -> Tensor:
    """Normalise rows to probabilities; a node without an outgoing edge moves to every node alike.

    Args:
        edges: Non-negative weights ``[nodes, nodes]``, ``edges[i, j]`` from node i to node j.

    Returns:
        Row-stochastic matrix ``[nodes, nodes]``, float64, on the CPU.

    Raises:
        NonFiniteError: A weight is NaN, infinite or negative.
    """
    weights = edges.detach().to("cpu", torch.float64)
    if not (torch.isfinite(weights).all() and (weights >= 0).all()):
        raise NonFiniteError(
            f"edge weights must be finite and at least 0, got values from {weights.min()} to {weights.max()}; "
            "check the model's weights and the images for NaN and infinity"
        )
    # Divided by the largest weight first, so that no row's sum can overflow.
    peaks = weights.amax(dim=1, keepdim=True)
    scaled = torch.where(peaks > 0, weights / peaks, torch.ones_like(weights))
    return scaled / scaled.sum(dim=1, keepdim=True)


def stationary_distribution(
    P: Tensor,
    *,
    damping: float,
    teleport: Tensor | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 10_000,
) -> StationaryDistribution:
    """Solve ``pi = damping * pi P + (1 - damping) * teleport`` by power iteration in float64.

    Each step is that of the lazy chain ``(G + I) / 2``: the same fixed point, and no periodic chain can
    keep it from converging.

    Args:
        P: Row-stochastic matrix ``[nodes, nodes]``.
        damping: Share of the chain, from 0 (teleport alone) to 1 (chain alone).
        teleport: Non-negative weights ``[nodes]``, normalised here; None is uniform.
        tolerance: Bound on the L1 residual.
        max_iterations: Bound on the steps; reaching it gives ``converged=False``.

    Raises:
        ConfigError: Damping outside 0 to 1, or a teleport that cannot be normalised.
    """
    if not 0 <= damping <= 1:
        raise ConfigError(f"damping must be from 0 (teleport alone) to 1 (chain alone), got {damping}")
    P = P.detach().to("cpu", torch.float64)
    jump = normalise(torch.ones(len(P)) if teleport is None else teleport)
    pi = jump
    iterations, residual = 0, float("inf")
    while True:
        step = damping * (pi @ P) + (1 - damping) * jump
        residual = float((step - pi).abs().sum())
        if residual <= tolerance or iterations == max_iterations:
            break
        pi = (pi + step) / 2
        pi = pi / pi.sum()
        iterations += 1
    return StationaryDistribution(
        pi=pi,
        iterations=iterations,
        residual=residual,
        converged=residual <= tolerance,
        irreducible=is_irreducible(P),
    )


def normalise(weights: Tensor) -> Tensor:
    """Scale non-negative weights ``[nodes]`` to sum to 1, in float64 on the CPU.

    Raises:
        ConfigError: A weight is negative, NaN or infinite, or all are 0.
    """
    weights = weights.detach().to("cpu", torch.float64)
    if not torch.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ConfigError(
            f"a distribution over heads needs finite weights of at least 0, not all 0; got {weights.tolist()}; "
            "'uniform' and 'weight_norm' are always possible"
        )
    weights = weights / weights.max()
    return weights / weights.sum()


def is_irreducible(P: Tensor) -> bool:
    """Whether every node can be reached from every node, by repeated squaring of the reachability matrix."""
    reach = ((P > 0) | torch.eye(len(P), dtype=torch.bool)).double()
    for _ in range(max(1, (len(P) - 1).bit_length())):
        reach = (reach @ reach).clamp(max=1)
    return bool((reach > 0).all())
