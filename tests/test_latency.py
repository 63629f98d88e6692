from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp import latency, models
from gohsp.core.allocation import WidthSettings
from gohsp.errors import ConfigError
from gohsp.latency import LatencySettings
from gohsp.structure import BlockShape, BlockTimes, LatencyTable, block_cost, model_cost

CPU = torch.device("cpu")
WIDTHS = WidthSettings(multiple=2, min_width=2)
TIMES = BlockTimes(
    heads=(1, 2),
    qk=(8, 16),
    vo=(8, 24),
    attention=(((1.0, 2.0), (3.0, 4.0)), ((5.0, 6.0), (7.0, 12.0))),
    saving=0.25,
    ffn=(10, 30),
    hidden=(1.0, 3.0),
)


def shape(heads: int, qk: int, vo: int, ffn: int) -> BlockShape:
    return BlockShape(heads=heads, qk=qk, vo=vo, ffn=ffn)


@pytest.mark.parametrize(
    ("asked", "time"),
    [
        (shape(1, 8, 8, 10), 2.0 - 0.25),  # measured points; equal widths save
        (shape(2, 16, 24, 30), 15.0),
        (shape(1, 8, 16, 20), 1.5 + 2.0),  # half way along one axis each
        (shape(1, 12, 16, 10), (1 + 2 + 3 + 4) / 4 + 1),  # half way along two
        (shape(0, 8, 8, 20), 2.0),  # a half that is asked for alone
        (shape(1, 8, 8, 0), 0.75),
        (shape(1, 4, 8, 50), 1.0 + 3.0),  # outside the grid, its end
    ],
)
def test_between_measured_widths_time_is_linear(asked: BlockShape, time: float) -> None:
    assert TIMES(asked) == pytest.approx(time)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2), st.integers(8, 16), st.integers(8, 24), st.integers(10, 30), st.integers(0, 3))
def test_a_wider_block_never_takes_less(heads: int, qk: int, vo: int, ffn: int, axis: int) -> None:
    here = [heads, qk, vo, ffn]
    wider = [v + (k == axis) for k, v in enumerate(here)]
    assert TIMES(shape(*wider)) >= TIMES(shape(*here)) - (TIMES.saving if wider[1] == wider[2] else 0) - 1e-12


def test_contestants_take_turns_and_the_median_counts() -> None:
    calls: list[str] = []

    def contestant(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            # One slow turn of five must not count.
            time.sleep(0.2 if name == "a" and calls.count("a") == 4 else seconds)

        return call

    fast, slow = latency.interleaved([contestant("a", 0.001), contestant("b", 0.02)], CPU, rounds=5)
    assert calls == ["a", "b"] * 7
    assert fast < 15 < slow < 150


def test_models_are_timed_at_the_asked_batch_and_type(model: nn.Module) -> None:
    seen: list[tuple[torch.Size, torch.dtype]] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            seen.append((x.shape, x.dtype, self.weight.dtype))
            return x

    how = LatencySettings(batch_size=5, dtype="bfloat16", rounds=1)
    spy = Spy()
    times = latency.compare([spy, spy], torch.rand(2, 3, 16, 16), how)
    assert set(seen) == {(torch.Size([5, 3, 16, 16]), torch.bfloat16, torch.bfloat16)}
    assert len(times) == 2
    assert min(times) > 0
    assert spy.weight.dtype == torch.float32


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True}], ids=str)
def test_the_table_prices_both_whole_networks_as_measured(
    arguments: dict, make_model: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that counts multiplications, the table must give back what the networks take."""
    model = make_model(mlp_ratio=2, **arguments)
    structure = models.describe(model)

    def multiplications(contestants: list[Callable[[], object]], _device: torch.device, _rounds: int) -> list[float]:
        from torch.utils.flop_counter import FlopCounterMode

        counts = []
        for call in contestants:
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(float(counter.get_total_flops()))
        return counts

    monkeypatch.setattr(latency, "interleaved", multiplications)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    advanced: list[int] = []
    table = latency.measure_table(
        model, structure, images, WIDTHS, LatencySettings(batch_size=2), lambda: advanced.append(1)
    )
    assert len(advanced) == 1 + latency.distinct_blocks(structure)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert table.scale == pytest.approx(1, rel=0.12)  # a width stands in for its neighbour where both are equal
    for shapes in (structure.shapes, [shape(2, structure.blocks[0].shape.qk, 4, 30)] * 2):
        expected = multiplications([lambda s=shapes: models.resized(model, s)(images[:2])], CPU, 1)[0]
        assert model_cost(structure, shapes, table) == pytest.approx(expected, rel=0.1)


def test_a_fit_finds_what_three_networks_were_made_of():
    gross, saved = np.array([20.0, 5.0, 11.0]), np.array([3.0, 3.0, 0.0])
    assert latency.fitted(gross, saved, 2 + 1.5 * (gross - 0.4 * saved)) == pytest.approx((2, 1.5, 0.4))
    # Savings that would be costs inside a network are taken as timed alone.
    fixed, scale, left = latency.fitted(gross, saved, 2 + 1.5 * (gross + 0.4 * saved))
    assert left == 1
    line = np.polynomial.Polynomial.fit(gross - saved, 2 + 1.5 * (gross + 0.4 * saved), 1).convert().coef
    assert (fixed, scale) == pytest.approx(tuple(line))
    # Nothing saved anywhere, nothing to cut anywhere, and a clock that runs backwards.
    assert latency.fitted(gross, 0 * saved, 2 + 1.5 * gross) == pytest.approx((2, 1.5, 1))
    fixed, scale, _ = latency.fitted([4.0] * 3, [0.0] * 3, [6.0] * 3)
    assert fixed + 4 * scale == pytest.approx(6)
    assert latency.fitted(gross, 0 * saved, 30 - gross) == pytest.approx((18, 0, 1))


def test_block_times_are_scaled_to_the_network(model: nn.Module) -> None:
    structure = models.describe(model)
    table = LatencyTable(fixed=3.0, scale=0.5, blocks={structure.blocks[0].shape: TIMES})
    assert block_cost(structure, structure.blocks[0], shape(1, 8, 8, 10), table) == pytest.approx(0.875)
    assert model_cost(structure, [shape(1, 8, 8, 10)] * 2, table) == pytest.approx(4.75)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"rounds": 0}, {"dtype": "int8"}])
def test_settings_that_cannot_be_measured_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match=r"latency"):
        LatencySettings(**bad)
