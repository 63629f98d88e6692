from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core.capture import attention_rows, observe_inputs
from gohsp.core.moments import AttentionMoments, InputFitter, collect_moments, tensors_of
from gohsp.core.projection import RepairSettings, constrained, select
from gohsp.core.rotation import balance_query_key, order_values, rotate, rotate_queries_keys, rotate_values
from gohsp.models import describe
from gohsp.structure import AttentionKept, AttentionWidths, Network
from linear import queries_keys

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
    query, key, x, y = random(seed, (d, n), (d, n), (40, n), (30, n))
    moment, key_moment = x.T @ x / 40, y.T @ y / 30
    to_query, to_key = balance_query_key(query, key, moment, key_moment)
    torch.testing.assert_close(to_query.T @ to_key, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close((to_query @ query).T @ (to_key @ key), query.T @ key, rtol=1e-6, atol=1e-7)

    # dropping trailing dimensions is the best low-rank approximation of the logits' map (Eckart-Young)
    root, key_root = square_root(moment), square_root(key_moment)
    singular = torch.linalg.svdvals(root @ query.T @ key @ key_root)
    for kept in range(d + 1):
        truncated = (to_query @ query)[:kept].T @ (to_key @ key)[:kept]
        error = (root @ (query.T @ key - truncated) @ key_root).square().sum()
        torch.testing.assert_close(error, singular[kept:].square().sum(), rtol=1e-5, atol=1e-6)

    # both sides carry each dimension alike
    query_energy = (to_query @ query @ moment @ (to_query @ query).T).diagonal()
    key_energy = (to_key @ key @ key_moment @ (to_key @ key).T).diagonal()
    torch.testing.assert_close(query_energy, singular[:d], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(key_energy, singular[:d], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_truncated_queries_and_keys_give_the_best_centred_logits(
    bias: bool, make_model: Callable[..., nn.Module]
) -> None:
    """Against an SVD of all logits themselves, each query's mean over the keys of an image taken off."""
    model = make_model(mlp_ratio=1, qkv_bias=bias)
    network = describe(model)
    (sub, *_) = network.attentions
    with torch.no_grad():  # tokens of an image have much in common, and so have its keys
        x = torch.randn(12, 5, 32) + 3 * torch.randn(12, 1, 32) + 2
    fitter = InputFitter(32, torch.device("cpu"))
    fitter.update(x)
    empty = torch.zeros(1, 1, dtype=torch.float64)
    rotate_queries_keys(model, sub, AttentionMoments(fitter.moment, fitter.within, empty))
    with torch.no_grad():
        q, k = (t.double().transpose(0, 1).flatten(1, 2) for t in queries_keys(model, sub, x))  # [heads, 60, 8]
    k = (k.unflatten(1, (12, 5)) - k.unflatten(1, (12, 5)).mean(2, keepdim=True)).flatten(1, 2)
    logits = q @ k.transpose(1, 2)
    singular = torch.linalg.svdvals(logits)
    for kept in range(1, 9):
        error = (logits - q[..., :kept] @ k[..., :kept].transpose(1, 2)).square().sum((1, 2))
        best = singular[:, kept:].square().sum(1)
        torch.testing.assert_close(error, best, rtol=1e-3, atol=1e-7 * float(logits.square().sum()))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_does_not_see_what_all_keys_of_an_image_share(
    fused: bool, model: nn.Module, network: Network
) -> None:
    sub, module = network.attentions[0], model.blocks[0].attn
    module.fused_attn = fused
    x = torch.randn(3, 5, 32)
    shift = torch.randn(3, 1, 32)  # another vector for every image
    rows = module.qkv.register_forward_hook(lambda _m, _i, out: out + F.pad(shift, (32, 32)))
    with torch.no_grad():
        shifted = module(x)
        rows.remove()
        expected = module(x)
        q, k = queries_keys(model, sub, x)
        probabilities = (q @ (k + shift.unflatten(2, (4, 8)).transpose(1, 2)).mT * sub.scale).softmax(-1)
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities, attention_rows(model, sub, x), rtol=1e-4, atol=1e-5)


kinds = st.sampled_from(["alive", "zero", "constant", "rank one", "tiny"])


def injured(rows: Tensor, kind: str) -> Tensor:
    """Rows ``[d, n]``, bias last, of which nothing, the bias or one direction is left; or all of it, times 1e-40."""
    if kind == "zero":
        return torch.zeros_like(rows)
    if kind == "constant":
        return torch.cat([torch.zeros_like(rows[:, :-1]), rows[:, -1:]], dim=1)
    if kind == "rank one":
        return rows[:, :1] * rows[:1]
    return rows * 1e-40 if kind == "tiny" else rows


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5), kinds, kinds, st.sampled_from([1, 4]))
def test_queries_and_keys_of_dead_heads_are_left_alive_ones_lose_nothing(
    seed: int, d: int, of_queries: str, of_keys: str, tokens: int
) -> None:
    """Against the logits themselves: nothing changes, and what carries nothing comes last."""
    query, key, x = random(seed, (d, 7), (d, 7), (40 * tokens, 7))
    query, key = injured(query, of_queries), injured(key, of_keys)
    x[:, -1] = 1
    within = (x.view(40, tokens, 7) - x.view(40, tokens, 7).mean(1, keepdim=True)).flatten(0, 1)
    to_query, to_key = balance_query_key(query, key, x.T @ x / len(x), within.T @ within / len(x))
    new_query, new_key = ((matrix @ rows).float() for matrix, rows in ((to_query, query), (to_key, key)))
    assert torch.isfinite(new_query).all()
    assert torch.isfinite(new_key).all()

    def centred(q: Tensor, k: Tensor) -> Tensor:
        return (x @ q.double().T) @ (within @ k.double().T).T

    logits = centred(query, key)
    scale = float((x @ query.T).norm() * (x @ key.T).norm())
    torch.testing.assert_close(centred(new_query, new_key), logits, rtol=0, atol=1e-5 * scale)
    kept = max(1, int((torch.linalg.svdvals(logits) > 1e-6 * scale).sum()))
    torch.testing.assert_close(centred(new_query[:kept], new_key[:kept]), logits, rtol=0, atol=1e-5 * scale)


def test_keys_may_have_a_bias_where_queries_have_none() -> None:
    query, key, x = random(0, (3, 6), (3, 7), (40, 7))
    x[:, -1] = 1
    centred = x - x.mean(0)
    moment, key_moment = x.T @ x / 40, centred.T @ centred / 40
    padded = torch.cat([query, torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    for mine, expected in zip(
        balance_query_key(query, key, moment, key_moment),
        balance_query_key(padded, key, moment, key_moment),
        strict=True,
    ):
        torch.testing.assert_close(mine.abs(), expected.abs())


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


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.integers(1, 5),
    st.sampled_from(["alive", "zero", "constant", "half constant"]),
    st.sampled_from([0.0, 1e-40, 1.0]),
    st.booleans(),
)
def test_values_of_dead_heads_are_left_alive_ones_lose_nothing(
    seed: int, d: int, kind: str, factor: float, bias: bool
) -> None:
    readout, x = random(seed, (6, d), (200, d))
    x = {"alive": x, "zero": 0 * x, "constant": x[:1].expand(200, d), "half constant": x.clone()}[kind]
    if kind == "half constant":
        x[:, : d // 2] = 3.0
    readout = factor * readout
    forward, backward = order_values(readout, x.T @ x / 200, x.mean(0) if bias else None)
    torch.testing.assert_close(forward @ backward, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-7)
    values, columns = (x @ forward.T).float(), (readout @ backward).float()
    assert torch.isfinite(values).all()
    assert torch.isfinite(columns).all()
    scale = float((x @ readout.T).norm())
    torch.testing.assert_close(values.double() @ columns.double().T, x @ readout.T, rtol=0, atol=1e-5 * scale)


def test_values_are_ordered_by_what_layer_scale_lets_through(make_model: Callable[..., nn.Module]) -> None:
    model = make_model(init_values=1.0)
    with torch.no_grad():  # three channels in four are all but shut
        model.blocks[0].ls1.gamma[8:] = 1e-3
    (sub, *_) = describe(model).attentions
    heads, vo = sub.widths.heads, sub.widths.vo
    (x,) = random(0, (200, heads * vo))
    outputs = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    empty = torch.zeros(1, 1, dtype=torch.float64)
    before = model.blocks[0].attn.proj.weight.detach().double()
    turned = rotate_values(model, sub, AttentionMoments(empty, empty, outputs.T @ outputs / 200))
    gamma = model.blocks[0].ls1.gamma.detach().double()[:, None]
    centred = x - x.mean(0)
    for h in range(heads):
        part = slice(h * vo, (h + 1) * vo)
        spread = turned.read[part, part] - torch.outer(*2 * [turned.read[part, -1]])
        written = gamma * model.blocks[0].attn.proj.weight[:, part].detach().double()
        singular = torch.linalg.svdvals(gamma * before[:, part] @ centred[:, part].T / 200**0.5)
        for kept in range(vo + 1):
            lost = written[:, kept:] @ spread[kept:, kept:] @ written[:, kept:].T
            torch.testing.assert_close(lost.trace(), singular[kept:].square().sum(), rtol=1e-4, atol=1e-7)


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
    network = describe(model)
    moments = collect_moments(model, network, [images])
    before = copy.deepcopy(model)
    turned = rotate(model, network, moments)
    with torch.no_grad():
        expected, got = before(images), model(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    measured = collect_moments(model, network, [images])
    assert turned.keys() == measured.keys()
    for name, told in turned.items():
        for a, b in zip(tensors_of(told), tensors_of(measured[name]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    rows = {"qk": slice(0, 64), "vo": slice(64, 96)}
    for kind, part in rows.items():
        old, new = before.blocks[1].attn.qkv.weight[part], model.blocks[1].attn.qkv.weight[part]
        assert torch.equal(old, new) != (kind in network.attentions[1].rotatable)


def test_attention_itself_is_untouched(model: nn.Module, network: Network, images: Tensor) -> None:
    moments = collect_moments(model, network, [images])
    x = torch.randn(3, 5, 32)
    before = attention_rows(model, network.attentions[0], x)
    rotate(model, network, moments)
    torch.testing.assert_close(attention_rows(model, network.attentions[0], x), before, rtol=1e-4, atol=1e-5)


def test_after_rotation_selection_keeps_leading_dimensions(
    make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    model = make_model(mlp_ratio=2, proj_bias=False)
    network = describe(model)
    moments = rotate(model, network, collect_moments(model, network, [images]))
    (sub, *_) = network.attentions
    values, want = constrained(model, sub, "activation"), AttentionWidths(heads=4, qk=3, vo=5)
    kept = select(sub, values, moments[sub.name], want, RepairSettings(guidance=0), metric="activation")
    assert isinstance(kept, AttentionKept)
    assert kept.qk == ((0, 1, 2),) * 4
    assert kept.vo == ((0, 1, 2, 3, 4),) * 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_leading_values_are_the_best_of_a_head(
    bias: bool, kept: int, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    """Where the readout's bias can take over means, a principal component analysis; else one about the origin."""
    model = make_model(mlp_ratio=2, proj_bias=bias)
    network = describe(model)
    sub, proj = network.attentions[0], model.blocks[0].attn.proj
    moments = collect_moments(model, network, [images])[sub.name]
    assert isinstance(moments, AttentionMoments)

    def contributions() -> tuple[Tensor, Tensor]:
        """Head outputs ``[heads, tokens, vo]`` and the readout's columns ``[heads, vo, D]``."""
        seen: list[Tensor] = []
        with observe_inputs(model, {sub.readout.module: seen.append}), torch.no_grad():
            model(images)
        z = seen[0].double().flatten(0, 1).unflatten(1, (4, 8)).transpose(0, 1)
        return z, proj.weight.detach().double().T.unflatten(0, (4, 8))

    z, columns = contributions()
    written = z @ columns
    after = rotate_values(model, sub, moments)
    z, columns = contributions()
    torch.testing.assert_close(z @ columns, written, rtol=1e-3, atol=1e-4)
    left = written - z[..., :kept] @ columns[:, :kept]
    if bias:
        left, written = left - left.mean(1, keepdim=True), written - written.mean(1, keepdim=True)
    best = torch.linalg.svdvals(written)[:, kept:].square().sum(1)
    torch.testing.assert_close(left.square().sum((1, 2)), best, rtol=1e-3, atol=1e-6 * float(written.square().sum()))
    flat = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(after.read[:-1, :-1], flat.mT @ flat / len(flat), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["qk", "vo"])
def test_a_basis_that_must_stay_stays(kind: str, make_model: Callable[..., nn.Module], images: Tensor) -> None:
    model = make_model(mlp_ratio=1, **({"qk_norm": True} if kind == "qk" else {"scale_attn_norm": True}))
    network = describe(model)
    moments = collect_moments(model, network, [images])
    (sub, *_), before = network.attentions, copy.deepcopy(model.state_dict())
    if kind == "qk":
        rotate_queries_keys(model, sub, moments[sub.name])
    else:
        assert rotate_values(model, sub, moments[sub.name]) is moments[sub.name]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("what", ["all", "query", "key", "value", "readout", "rank one"])
def test_degenerate_heads(what: str, model: nn.Module, network: Network, images: Tensor) -> None:
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
        moments = rotate(model, network, collect_moments(model, network, [images]))
        got = model(images)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.isfinite(of.read).all() for of in moments.values())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
