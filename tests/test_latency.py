from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp import latency, models
from gohsp.config import LatencySettings
from gohsp.core.allocation import WidthSettings
from gohsp.errors import ConfigError
from gohsp.structure import Attention, AttentionWidths, FfnWidths, Network, cost_of

CPU = torch.device("cpu")
WIDTHS = WidthSettings(multiple=2, min_width=2)


def test_contestants_take_turns_and_the_median_counts() -> None:
    calls: list[str] = []

    def contestant(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            # One slow turn of five must not count.
            time.sleep(0.2 if name == "a" and calls.count("a") == 4 else seconds)

        return call

    fast, slow = latency.interleaved([contestant("a", 0.001), contestant("b", 0.02)], CPU, rounds=5)
    rounds = ["".join(calls[place : place + 2]) for place in range(0, 14, 2)]
    assert set(rounds) == {"ab", "ba"}  # each once a round, now this first and now that
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


def multiplications(contestants: list[Callable[[], object]], _device: torch.device, _rounds: int) -> list[float]:
    """A clock that counts multiplications."""
    counts = []
    for call in contestants:
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:  # it trips over constants otherwise
            call()
        counts.append(float(counter.get_total_flops()))
    return counts


def widths_of(network: Network, attention: AttentionWidths, units: int) -> dict[str, AttentionWidths | FfnWidths]:
    return {sub.name: attention if isinstance(sub, Attention) else FfnWidths(units=units) for sub in network.sublayers}


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True}], ids=str)
def test_times_of_sublayers_price_whole_networks_as_measured(
    arguments: dict, make_model: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(mlp_ratio=2, **arguments)
    network = models.describe(model)
    monkeypatch.setattr(latency, "interleaved", multiplications)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    advanced: list[int] = []
    times = latency.measure_times(
        model, network, images, WIDTHS, LatencySettings(batch_size=2), lambda: advanced.append(1)
    )
    assert latency.distinct(network) == 2  # an attention and an FFN, whatever the block
    assert len(advanced) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(times.times) == set(network.widths)
    assert times.scale == pytest.approx(1, rel=0.12)  # a width stands in for its neighbour where both are equal
    qk = network.attentions[0].widths.qk
    cut = widths_of(network, AttentionWidths(heads=2, qk=qk, vo=4), 30)
    gone = {**network.widths, "blocks.1.attn": AttentionWidths(heads=0, qk=0, vo=0), "blocks.0.mlp": FfnWidths(units=0)}
    for widths in (network.widths, cut, gone):
        expected = multiplications([lambda w=widths: models.resized(model, w)(images[:2])], CPU, 1)[0]
        assert cost_of(network, widths, times) == pytest.approx(expected, rel=0.1)


def test_what_was_removed_is_not_timed(
    make_model: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_model(mlp_ratio=2)
    gone = {**models.describe(dense).widths, "blocks.1.mlp": FfnWidths(units=0)}
    model = models.resized(dense, gone)
    network = models.describe(model)
    monkeypatch.setattr(latency, "interleaved", multiplications)
    times = latency.measure_times(model, network, images, WIDTHS, LatencySettings(batch_size=2))
    assert set(times.times) == {"blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"}
    expected = multiplications([lambda: model(images[:2])], CPU, 1)[0]
    assert cost_of(network, network.widths, times) == pytest.approx(expected, rel=0.1)


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


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"rounds": 0}, {"dtype": "int8"}])
def test_settings_that_cannot_be_measured_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match=r"latency"):
        LatencySettings(**bad)
