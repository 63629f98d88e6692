from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core.moments import (
    InputFitter,
    MomentFitter,
    RegressionFitter,
    collect_moments,
    tensors_of,
)
from gohsp.errors import NonFiniteError
from gohsp.models import describe, resized
from gohsp.structure import Network, absent
from linear import weighted

seeds = st.integers(0, 10**6)
CPU = torch.device("cpu")
WEIGHTS = torch.tensor([2.5, 0.0, 0.7, 0.3])


@settings(max_examples=20, deadline=None)
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_streamed_moments_equal_those_of_one_batch(seed: int, sizes: list[int]) -> None:
    x = torch.randn(sum(sizes), 2, 4, generator=torch.Generator().manual_seed(seed))
    streamed = MomentFitter(4, CPU)
    for part in x.split(sizes):
        streamed.update(part)
    flat = torch.cat([x.reshape(-1, 4), torch.ones(2 * len(x), 1)], dim=1).double()
    torch.testing.assert_close(streamed.moment, flat.T @ flat / len(flat), rtol=1e-5, atol=1e-5)
    assert streamed.moment.dtype == torch.float64


def test_half_precision_activations_are_accumulated_in_full() -> None:
    x = torch.full((4096, 1), 0.1, dtype=torch.bfloat16)
    fitter = MomentFitter(1, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fitter.update(x)
    value = float(x[0].double())
    # Equal terms round alike, so that a float32 sum may err by 2e-5 in some BLAS; bfloat16 by 1e-3 or more.
    assert float(fitter.moment[0, 0]) == pytest.approx(value**2, rel=1e-4)
    assert float(fitter.moment[0, 1]) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("weights", [WEIGHTS, 3 * WEIGHTS, None], ids=["weights", "scaled", "none"])
def test_token_weights_weigh_the_moment(weights: Tensor | None) -> None:
    x = torch.randn(7, 4, 3) + 1
    fitter = MomentFitter(3, CPU, weights)
    for part in x.split([2, 5]):
        fitter.update(part)
    rows = weighted(x, torch.ones(4) if weights is None else weights)
    torch.testing.assert_close(fitter.moment, rows.T @ rows, rtol=1e-5, atol=1e-6)
    assert float(fitter.moment[-1, -1]) == pytest.approx(1)


@pytest.mark.parametrize("grid", [(4,), (2, 2)], ids=str)
def test_moments_about_each_images_mean(grid: tuple[int, ...]) -> None:
    x = torch.randn(7, 4, 3) + 3 * torch.randn(7, 1, 3)
    fitter = InputFitter(3, CPU)
    for part in x.split([3, 1, 3]):
        fitter.update(part.unflatten(1, grid))
    centred = torch.cat([(x - x.mean(1, keepdim=True)).double(), torch.zeros(7, 4, 1)], dim=-1).flatten(0, 1)
    torch.testing.assert_close(fitter.within, centred.T @ centred / 28, rtol=1e-4, atol=1e-5)
    rows = weighted(x, torch.ones(4))
    torch.testing.assert_close(fitter.moment, rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_folds_are_disjoint_by_image_and_add_up() -> None:
    x, y = torch.randn(6, 4, 5), torch.randn(6, 4, 3)
    fitter = RegressionFitter(5, 3, CPU)
    fitter.update(x, y)
    fitter.update(x.flip(1), y.flip(1))  # another view of the same images belongs to the same folds
    splits = fitter.splits()
    assert [held_out.count for _, held_out in splits] == [16, 16, 8, 8]
    weight = torch.randn(3, 6, dtype=torch.float64)
    for fold, (rest, held_out) in enumerate(splits):
        for part, mine in ((held_out, True), (rest, False)):
            images = [i for i in range(6) if (i % 4 == fold) == mine]
            rows = torch.cat([x[images], torch.ones(len(images), 4, 1)], dim=-1).flatten(0, 1).double()
            targets = y[images].flatten(0, 1).double()
            torch.testing.assert_close(part.gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
            error = 2 * ((rows @ weight.T - targets).square().sum() - targets.square().sum())
            assert part.error(weight) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("weigh", [True, False])
def test_collected_moments_are_those_of_the_modules_inputs(
    weigh: bool, model: nn.Module, network: Network, images: Tensor
) -> None:
    model.train()
    even = torch.ones(5)
    weights = {"blocks.1.attn": torch.tensor([3.0, 1, 0, 0, 1]), "blocks.1.mlp": torch.tensor([0.5, 0.5, 1, 1, 2])}
    got = collect_moments(model, network, list(images.split(5)), weights if weigh else None)
    assert model.training
    seen: dict[str, Tensor] = {}
    for name in ("attn", "attn.proj", "mlp.fc2"):
        module = model.blocks[1].get_submodule(name)
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].double()))
    with torch.no_grad():
        model.eval()(images)
    expected = {
        "blocks.1.attn": (
            weighted(seen["attn"], even),
            weighted(seen["attn"] - seen["attn"].mean(1, keepdim=True), even) * torch.tensor([1.0] * 32 + [0]),
            weighted(seen["attn.proj"], weights["blocks.1.attn"] if weigh else even),
        ),
        "blocks.1.mlp": (weighted(seen["mlp.fc2"], weights["blocks.1.mlp"] if weigh else even),),
    }
    assert list(got) == [sub.name for sub in network.present]
    for name, rows_of in expected.items():
        for moment, rows in zip(tensors_of(got[name]), rows_of, strict=True):
            torch.testing.assert_close(moment, rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_an_absent_sublayer_has_no_moments(model: nn.Module, images: Tensor) -> None:
    network = describe(model)
    gone = {name: absent(of) if name == "blocks.0.attn" else of for name, of in network.widths.items()}
    small = resized(model, gone)
    assert list(collect_moments(small, describe(small), [images])) == ["blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]


def test_non_finite_activations_are_named(model: nn.Module, network: Network, images: Tensor) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"input of module 'blocks\.1\.mlp\.fc2' holds NaN"):
        collect_moments(model, network, [images])
