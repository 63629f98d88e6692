"""The chain against theory: eigenvectors, reversibility, damping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gohsp.core.ranking.graph import (
    is_irreducible,
    isolated_nodes,
    normalise,
    stationary_distribution,
    transition_matrix,
)
from gohsp.errors import ConfigError, NonFiniteError


def random_edges(nodes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(nodes, nodes, generator=generator, dtype=torch.float64)


def leading_left_eigenvector(P: Tensor) -> Tensor:
    values, vectors = torch.linalg.eig(P.T)
    leading = vectors[:, values.real.argmax()].real
    return leading / leading.sum()


@st.composite
def edge_matrices(draw: st.DrawFn) -> Tensor:
    nodes = draw(st.integers(1, 6))
    weight = st.one_of(st.just(0.0), st.floats(0, 1.7e308), st.floats(0, 1e-300), st.floats(0, 1))
    row = st.one_of(st.just([0.0] * nodes), st.lists(weight, min_size=nodes, max_size=nodes))
    return torch.tensor([draw(row) for _ in range(nodes)], dtype=torch.float64)


@given(edge_matrices())
def test_transition_matrix_is_row_stochastic_for_any_edges(edges: Tensor) -> None:
    P = transition_matrix(edges)
    assert (P >= 0).all()
    torch.testing.assert_close(P.sum(dim=1), torch.ones(len(P), dtype=torch.float64), rtol=0, atol=1e-12)


def test_transition_follows_edges_and_isolated_nodes_move_anywhere() -> None:
    edges = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0, 0.25, 0.75], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(transition_matrix(edges), expected)
    assert isolated_nodes(edges) == [2]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_transition_refuses_weights_that_are_none(bad: float) -> None:
    edges = random_edges(3)
    edges[1, 2] = bad
    with pytest.raises(NonFiniteError, match="finite and at least 0"):
        transition_matrix(edges)


@pytest.mark.parametrize("nodes", [1, 2, 3, 12, 36])
@pytest.mark.parametrize("damping", [0.0, 0.3, 0.85, 1.0])
def test_stationary_distribution_is_the_leading_left_eigenvector(nodes: int, damping: float) -> None:
    P = transition_matrix(random_edges(nodes))
    teleport = random_edges(nodes, seed=1)[0]
    damped = damping * P + (1 - damping) * teleport / teleport.sum()
    result = stationary_distribution(P, damping=damping, teleport=teleport)
    assert result.converged
    assert result.residual <= 1e-10
    torch.testing.assert_close(result.pi, leading_left_eigenvector(damped), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.pi @ damped, result.pi, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nodes", [2, 5, 24])
def test_reversible_chain_is_nothing_but_node_strength(nodes: int) -> None:
    edges = random_edges(nodes)
    edges = (edges + edges.T).fill_diagonal_(0)
    result = stationary_distribution(transition_matrix(edges), damping=1.0)
    torch.testing.assert_close(result.pi, edges.sum(dim=1) / edges.sum(), rtol=0, atol=1e-8)


def test_directed_edges_say_more_than_node_strength() -> None:
    edges = random_edges(6).fill_diagonal_(0)
    pi = stationary_distribution(transition_matrix(edges), damping=1.0).pi
    for strength in (edges.sum(dim=1), edges.sum(dim=0)):
        assert (pi - strength / strength.sum()).abs().max() > 1e-3


def test_without_chain_the_teleport_remains() -> None:
    teleport = torch.tensor([1.0, 2.0, 5.0])
    result = stationary_distribution(transition_matrix(random_edges(3)), damping=0.0, teleport=teleport)
    torch.testing.assert_close(result.pi, teleport.double() / 8)
    assert result.iterations == 0


def test_periodic_chain_converges() -> None:
    star = torch.zeros(4, 4)
    star[0, 1:] = star[1:, 0] = 1  # all even steps lead back: plain power iteration would swing for ever
    result = stationary_distribution(transition_matrix(star), damping=1.0)
    assert result.converged
    torch.testing.assert_close(result.pi, torch.tensor([3, 1, 1, 1], dtype=torch.float64) / 6, rtol=0, atol=1e-9)


def test_damping_makes_a_reducible_graph_unique_and_it_is_reported() -> None:
    edges = torch.zeros(4, 4)
    edges[0, 1] = edges[1, 0] = edges[2, 3] = edges[3, 2] = 1  # two islands
    P = transition_matrix(edges)
    teleport = torch.tensor([3.0, 3.0, 1.0, 1.0])
    result = stationary_distribution(P, damping=0.85, teleport=teleport)
    assert result.converged
    assert not result.irreducible
    torch.testing.assert_close(result.pi, teleport.double() / 8, rtol=0, atol=1e-9)
    assert stationary_distribution(transition_matrix(random_edges(4)), damping=0.85).irreducible


@pytest.mark.parametrize("nodes", [2, 7, 9, 33])
def test_irreducibility_sees_the_longest_path(nodes: int) -> None:
    ring = torch.eye(nodes, dtype=torch.float64).roll(1, dims=1)
    assert is_irreducible(ring)
    ring[0] = torch.eye(nodes, dtype=torch.float64)[0]  # node 0 keeps what reaches it
    assert not is_irreducible(ring)


def test_an_iteration_limit_is_reported_and_not_hidden() -> None:
    P = transition_matrix(random_edges(6))
    teleport = torch.eye(6)[0]
    result = stationary_distribution(P, damping=0.9, teleport=teleport, max_iterations=2)
    assert not result.converged
    assert result.iterations == 2
    assert result.residual > 1e-10


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_normalise_refuses_what_is_no_distribution(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="finite weights"):
        normalise(torch.tensor(weights))


@pytest.mark.parametrize("damping", [-0.1, 1.1, math.nan])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match="damping must be from 0"):
        stationary_distribution(transition_matrix(random_edges(2)), damping=damping)
