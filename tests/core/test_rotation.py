from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core.activations import attention_rows
from gohsp.core.compensation import collect_moments
from gohsp.core.projection import ProjectionSettings, constrained, select
from gohsp.core.rotation import balance_query_key, order_values, rotate
from gohsp.models import describe
from gohsp.structure import BlockShape, ModelStructure

seeds = st.integers(0, 10**6)


def random(seed: int, *sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).double() for size in sizes]


def square_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(5, 8))
def test_balanced_queries_and_keys(seed: int, d: int, n: int) -> None:
    query, key, x = random(seed, (d, n), (d, n), (40, n))
    moment = x.T @ x / 40
    to_query, to_key = balance_query_key(query, key, moment)
    torch.testing.assert_close(to_query.T @ to_key, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close((to_query @ query).T @ (to_key @ key), query.T @ key, rtol=1e-6, atol=1e-7)

    # dropping trailing dimensions is the best low-rank approximation of the logits' map (Eckart-Young)
    root = square_root(moment)
    singular = torch.linalg.svdvals(root @ query.T @ key @ root)
    for kept in range(d + 1):
        truncated = (to_query @ query)[:kept].T @ (to_key @ key)[:kept]
        error = (root @ (query.T @ key - truncated) @ root).square().sum()
        torch.testing.assert_close(error, singular[kept:].square().sum(), rtol=1e-5, atol=1e-6)

    # both sides carry each dimension alike
    query_energy = (to_query @ query @ moment @ (to_query @ query).T).diagonal()
    key_energy = (to_key @ key @ moment @ (to_key @ key).T).diagonal()
    torch.testing.assert_close(query_energy, singular[:d], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(key_energy, singular[:d], rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(5, 8))
def test_ordered_values(seed: int, d: int, outputs: int) -> None:
    readout, x = random(seed, (outputs, d), (40, d))
    moment = x.T @ x / 40
    forward, backward = order_values(readout, moment)
    torch.testing.assert_close(forward @ backward, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-7)
    singular = torch.linalg.svdvals(readout @ square_root(moment))
    for kept in range(d + 1):
        truncated = (readout @ backward)[:, :kept] @ forward[:kept]
        error = ((readout - truncated) @ moment @ (readout - truncated).T).trace()
        torch.testing.assert_close(error, singular[kept:].square().sum(), rtol=1e-5, atol=1e-6)


FAMILIES = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False},
    "qk-norm": {"qk_norm": True},
    "value norm": {"scale_attn_norm": True},
    "LayerScale": {"init_values": 1e-5},
}


@pytest.mark.parametrize("arguments", FAMILIES.values(), ids=FAMILIES)
def test_rotation_leaves_the_function_and_foretells_the_moments(
    arguments: dict, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    model = make_model(mlp_ratio=1, **arguments)
    structure = describe(model)
    moments = collect_moments(model, structure, [images])
    before = copy.deepcopy(model)
    turned = rotate(model, structure, moments)
    with torch.no_grad():
        expected, got = before(images), model(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for told, measured in zip(turned, collect_moments(model, structure, [images]), strict=True):
        for name in ("attention_input", "head_outputs", "hidden"):
            a, b = getattr(told, name), getattr(measured, name)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    rows = {"qk": slice(0, 64), "vo": slice(64, 96)}
    for kind, part in rows.items():
        old, new = before.blocks[1].attn.qkv.weight[part], model.blocks[1].attn.qkv.weight[part]
        assert torch.equal(old, new) != (kind in structure.blocks[1].rotatable)


def test_attention_itself_is_untouched(model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    moments = collect_moments(model, structure, [images])
    x = torch.randn(3, 5, 32)
    before = attention_rows(model, structure.blocks[0], x)
    rotate(model, structure, moments)
    torch.testing.assert_close(attention_rows(model, structure.blocks[0], x), before, rtol=1e-4, atol=1e-5)


def test_after_rotation_selection_keeps_leading_dimensions(
    model: nn.Module, structure: ModelStructure, images: Tensor
) -> None:
    moments = rotate(model, structure, collect_moments(model, structure, [images]))
    block = structure.blocks[0]
    how = ProjectionSettings(metric="euclidean", strength="activation", guidance=0)
    kept = select(
        block, constrained(model, block, "euclidean"), moments[0], BlockShape(heads=4, qk=3, vo=5, ffn=64), how
    )
    assert kept.qk == ((0, 1, 2),) * 4
    assert kept.vo == ((0, 1, 2, 3, 4),) * 4


@pytest.mark.parametrize("what", ["all", "query", "key", "value", "readout", "rank one"])
def test_degenerate_heads(what: str, model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    attn = model.blocks[0].attn
    with torch.no_grad():
        rows = {"query": [0], "key": [1], "value": [2], "all": [0, 1, 2], "rank one": [], "readout": []}[what]
        for part in rows:
            attn.qkv.weight[part * 32 : part * 32 + 8] = 0
            attn.qkv.bias[part * 32 : part * 32 + 8] = 0
        if what in ("all", "readout"):
            attn.proj.weight[:, :8] = 0
        if what == "rank one":
            for part in range(3):
                attn.qkv.weight[part * 32 + 1 : part * 32 + 8] = attn.qkv.weight[part * 32]
                attn.qkv.bias[part * 32 + 1 : part * 32 + 8] = attn.qkv.bias[part * 32]
        expected = model(images)
        moments = rotate(model, structure, collect_moments(model, structure, [images]))
        got = model(images)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.isfinite(m.head_outputs).all() for m in moments)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
