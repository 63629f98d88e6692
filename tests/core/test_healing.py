from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from gohsp.core import healing
from gohsp.core.capture import Call, Trunk, open_trunk
from gohsp.core.healing import HealSettings, HealStep, heal
from gohsp.data.spool import Spool
from gohsp.errors import ConfigError
from gohsp.models import describe, resized
from gohsp.structure import absent

SETTINGS = HealSettings(epochs=4, learning_rate=3e-3)
"""Few steps: enough to tell tuned blocks from untouched ones."""
LONG = replace(SETTINGS, epochs=20)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen images are to make more than one step."""
    monkeypatch.setattr(healing, "BATCH", 8)


@pytest.fixture
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks are tuned together; the parameter of a test."""
    monkeypatch.setattr(healing, "WINDOW", request.param)
    return request.param


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5
    ).eval()


def pair() -> tuple[nn.Module, nn.Module]:
    """A dense model, and one whose blocks are off by some noise."""
    teacher = network(0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in student.get_submodule("blocks").parameters():
            weight += 0.1 * torch.randn_like(weight)
    return teacher, student


def images(seed: int, batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 3, 16, 16, generator=generator) for _ in range(batches)]


def gap(teacher: nn.Module, student: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        a, b = (torch.cat([model(x) for x in batches]).log_softmax(-1) for model in (teacher, student))
    return float(nn.functional.kl_div(b, a, reduction="batchmean", log_target=True))


def trunk(model: nn.Module) -> Trunk:
    return open_trunk(model, describe(model), images(1)[0][:1])


def run(
    pairing: tuple[nn.Module, nn.Module],
    settings: HealSettings = SETTINGS,
    distance: list[float] | Callable[[], float] | None = None,
    **more: object,
) -> tuple[HealStep, ...]:
    teacher, student = pairing
    if distance is None:
        distance = partial(gap, teacher, student, images(2))
    dense = trunk(teacher)
    with torch.no_grad():
        entered = [dense.enter(x) for x in images(1)]
    told = iter(distance).__next__ if isinstance(distance, list) else distance
    return heal(trunk(student), dense, entered, {}, settings, distance=told, **more)


def tuned(
    student: tuple[nn.Module, ...],
    teacher: tuple[nn.Module, ...],
    stream: list[Tensor],
    weights: Mapping[int, Tensor],
    settings: HealSettings,
    distance: Iterable[float],
    **more: object,
) -> tuple[HealStep, ...]:
    """Heal bare blocks, with nothing before or behind them."""
    names, calls = tuple(map(str, range(len(student)))), (Call((), {}),) * len(student)
    trunks = [
        Trunk(nn.ModuleList(blocks), names, calls, (None,) * len(names), frozenset(), torch.zeros(1, 1))
        for blocks in (student, teacher)
    ]
    return heal(*trunks, stream, weights, settings, distance=iter(distance).__next__, **more)


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    return [copy.deepcopy(block.state_dict()) for block in model.blocks]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_it_comes_closer_on_images_it_has_not_seen() -> None:
    teacher, student = pair()
    before, weights = gap(teacher, student, images(2)), copy.deepcopy(teacher.state_dict())
    curve = run((teacher, student), LONG)
    assert [step.blocks for step in curve] == [0, 1, 2, 3]
    assert curve[0].distance == pytest.approx(before)
    assert min(step.distance for step in curve) == pytest.approx(gap(teacher, student, images(2)), rel=1e-4)
    assert gap(teacher, student, images(2)) < 0.7 * before
    assert same(weights, teacher.state_dict())


class Told(nn.Module):
    """Stands for a dense block: knows what to answer to every batch that it will be given."""

    def __init__(self, answers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.answers = answers
        self.device_is_read_from = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return next(y for given, y in self.answers if torch.equal(given, x))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_linear_block_reaches_the_weighted_least_squares_fit(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "BATCH", 32)
    torch.manual_seed(0)
    block = nn.Linear(4, 3)
    stream, targets = [torch.randn(32, 5, 4) for _ in range(2)], [torch.randn(32, 5, 3) for _ in range(2)]
    importance = torch.tensor([3.0, 0.5, 0.5, 0.5, 0.5]) if weighted else torch.ones(5)
    tuned(
        (block,),
        (Told(list(zip(stream, targets, strict=True))),),
        stream,
        {0: importance} if weighted else {},
        HealSettings(epochs=400, learning_rate=0.02),
        [1.0, 0.0],
    )
    rows = torch.cat([torch.cat(stream), torch.ones(64, 5, 1)], dim=2) * importance.sqrt()[:, None]
    wanted = torch.cat(targets) * importance.sqrt()[:, None]
    best = torch.linalg.lstsq(rows.flatten(0, 1).double(), wanted.flatten(0, 1).double()).solution.float()
    torch.testing.assert_close(torch.cat([block.weight.T, block.bias[None]]), best, atol=0.01, rtol=0)


class Shift(nn.Module):
    """Adds a number, which can be learnt unless it is fixed."""

    def __init__(self, by: float, *, fixed: bool = False) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
        self.still = nn.Parameter(torch.zeros(()))
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.by.detach() if self.fixed else self.by) + 0 * self.still


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("window", [1], indirect=True)
@pytest.mark.parametrize(("fixed", "second"), [(True, -0.75), (False, 0.0)])
def test_a_block_is_given_what_the_tuned_ones_before_it_send(fixed: bool, second: float) -> None:
    """Where the first of two shifts cannot be mended, the second has to undo it; else there is nothing to undo."""
    student, teacher = (Shift(1.0, fixed=fixed), Shift(-0.75)), (Shift(0.25), Shift(0.0))
    x = torch.randn(8, 2, 3)
    curve = tuned(
        student,
        teacher,
        [x],
        {},
        HealSettings(epochs=300, learning_rate=0.03),
        [3.0, 2.0, 1.0],
    )
    assert float(student[0].by.detach()) == pytest.approx(1.0 if fixed else 0.25, abs=0.01)
    assert float(student[1].by.detach()) == pytest.approx(second, abs=0.02)
    assert curve[1].error == pytest.approx(
        0.75**2 / float(x.var(dim=(0, 1), correction=0).mean()) if fixed else 0, abs=1e-3
    )


@pytest.mark.parametrize(("window", "first"), [(1, 1.0), (2, 0.5)], indirect=["window"])
def test_blocks_of_a_window_answer_for_what_the_next_ones_make_of_their_errors(window: int, first: float) -> None:
    """Asked for a shift of 1 and then of none, where the second can give none: together, both errors count alike."""
    student, teacher = (Shift(0.0), Shift(0.0, fixed=True)), (Shift(1.0), Shift(-1.0))
    x = torch.randn(8, 2, 3)
    curve = tuned(
        student,
        teacher,
        [x],
        {},
        HealSettings(epochs=300, learning_rate=0.03),
        [3.0, 2.0, 1.0],
    )
    # The targets' variances are alike: shifts do not change them.
    assert float(student[0].by.detach()) == pytest.approx(first, abs=0.02)
    assert curve[1].error == pytest.approx((1 - first) ** 2 / float(x.var(dim=(0, 1), correction=0).mean()), abs=2e-3)


class Gain(Shift):
    """Multiplies by a number that cannot be learnt."""

    def forward(self, x: Tensor) -> Tensor:
        return self.by.detach() * x + 0 * self.still


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("window", [2], indirect=True)
def test_every_error_of_a_window_is_relative_to_its_own_target() -> None:
    """Behind a gain of 3 an error is three times as large, and counts no more than before it."""
    student, x = (Shift(0.0), Gain(3.0)), torch.randn(8, 2, 3)
    told = (Told([(x, x + 1)]), Told([(x + 1, 3 * x)]))
    tuned(
        student,
        told,
        [x],
        {},
        HealSettings(epochs=300, learning_rate=0.03),
        [3.0, 1.0, 2.0],
    )
    assert float(student[0].by.detach()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("window", [2], indirect=True)
def test_a_window_slides_on_to_the_targets_of_its_blocks() -> None:
    student, wanted = tuple(Shift(0.0) for _ in range(4)), (0.25, 0.5, -0.75, 1.0)
    tuned(
        student,
        tuple(map(Shift, wanted)),
        [torch.randn(8, 2, 3)],
        {},
        HealSettings(epochs=400, learning_rate=0.1),
        [5.0, 4.0, 3.0, 2.0, 1.0],
    )
    assert [float(block.by.detach()) for block in student] == pytest.approx(wanted, abs=0.02)


class Counted(list[Tensor]):
    """Notes how many of its kind there are, and the most that there were."""

    now = most = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.now += 1
        Counted.most = max(Counted.most, Counted.now)

    def __del__(self) -> None:
        Counted.now -= 1


@pytest.mark.parametrize(("window", "most"), [(1, 3), (2, 3), (3, 4)], indirect=["window"])
def test_no_more_streams_are_kept_than_a_window_needs(window: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "most", 0)
    tuned(
        tuple(Shift(0.0) for _ in range(6)),
        tuple(Shift(1.0) for _ in range(6)),
        [torch.randn(8, 2, 3)],
        {},
        HealSettings(epochs=1),
        range(9, 0, -1),
        store=Counted,
    )
    assert (Counted.most, Counted.now) == (most, 0)


def test_all_blocks_of_a_window_are_tuned() -> None:
    """A window of three has mended all blocks of three when it begins; nothing is left to do for later ones."""
    student, teacher = (Shift(1.0), Shift(1.0), Shift(1.0)), (Shift(0.25), Shift(0.0), Shift(-0.5))
    curve = tuned(
        student,
        teacher,
        [torch.randn(8, 2, 3)],
        {},
        HealSettings(epochs=400, learning_rate=0.1),
        [3.0, 0.0, 1.0, 2.0],  # the state after the first window stays
    )
    assert [float(block.by.detach()) for block in student] == pytest.approx([0.25, 0.0, -0.5], abs=0.02)
    assert curve[1].error == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("window", "distance"), [(1, [3.0, 2.0, 1.0]), (2, [3.0, 1.0, 2.0])], indirect=["window"])
def test_every_block_has_its_own_token_weights(window: int, distance: list[float]) -> None:
    """A shift of all tokens alike can only meet the mean of what they need, and does so by the weights."""
    weights = {0: torch.tensor([2.0, 0.0]), 1: torch.tensor([0.0, 2.0])}
    student, x = (Shift(0.0), Shift(0.0)), torch.randn(8, 2, 3)
    needed = torch.tensor([1.0, -1.0])[:, None]
    told = [Told([(x, x + needed)]), Told([(x + needed, x + needed)])]
    tuned(
        student,
        tuple(told),
        [x],
        weights,
        HealSettings(epochs=300, learning_rate=0.03),
        distance,
    )
    assert float(student[0].by.detach()) == pytest.approx(1.0, abs=0.01)
    assert float(student[1].by.detach()) == pytest.approx(-2.0, abs=0.02)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_lower_precision_ends_nearby(precision: torch.dtype) -> None:
    settings = replace(SETTINGS, epochs=10)
    curves = [run(pair(), settings, precision=given) for given in (torch.float32, precision)]
    assert [step.distance for step in curves[1]] != [step.distance for step in curves[0]]
    assert min(s.distance for s in curves[1]) == pytest.approx(min(s.distance for s in curves[0]), rel=0.3)


class Listening(Shift):
    """Notes the data type that it is told to compute in, apart for passes with and without gradients."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.heard: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def forward(self, x: Tensor) -> Tensor:
        enabled = torch.is_autocast_enabled("cpu")
        self.heard[torch.is_grad_enabled()].add(torch.get_autocast_dtype("cpu") if enabled else torch.float32)
        return super().forward(x)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_blocks_are_trained_and_passed_in_the_precision_asked_for(precision: torch.dtype) -> None:
    student, teacher = (Listening(), Listening()), (Listening(), Listening())
    tuned(
        student,
        teacher,
        [torch.randn(8, 2, 3)],
        {},
        replace(SETTINGS, epochs=3),
        [3.0, 2.0, 1.0],
        precision=precision,
    )
    assert student[0].heard == {True: {precision}, False: {precision}}
    assert student[1].heard == {True: {precision}, False: set()}  # nothing reads what the last block sends
    assert teacher[1].heard == {True: set(), False: {precision}}


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("window", [1], indirect=True)
@pytest.mark.parametrize(("distance", "best"), [([1.0, 2.0, 3.0, 4.0], 0), ([4.0, 3.0, 1.0, 2.0], 2)])
def test_as_many_blocks_are_kept_tuned_as_help(distance: list[float], best: int) -> None:
    pairing = pair()
    before = states(pairing[1])
    assert [step.distance for step in run(pairing, distance=distance)] == distance
    everything = pair()
    run(everything, distance=[4.0, 3.0, 2.0, 1.0])
    for i, (kept, untouched, tuned) in enumerate(zip(states(pairing[1]), before, states(everything[1]), strict=True)):
        assert not same(untouched, tuned)
        assert same(kept, tuned if i < best else untouched)


def test_the_state_of_least_distance_is_kept_whole() -> None:
    """A window that does not help takes back what it did to a block that the window before it had tuned."""
    pairing, steps = pair(), []
    told = iter([4.0, 3.0, 3.6, 3.5])

    def distance() -> float:
        steps.append(states(pairing[1]))
        return next(told)

    run(pairing, distance=distance)
    assert not same(steps[1][1], steps[2][1])
    assert all(same(a, b) for a, b in zip(steps[1], states(pairing[1]), strict=True))


def test_what_blows_up_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    pairing = pair()
    before = states(pairing[1])
    curve = run(pairing, replace(SETTINGS, learning_rate=1e30))
    assert len(curve) == 1
    assert all(same(a, b) for a, b in zip(before, states(pairing[1]), strict=True))
    assert "the window at block 0 ended in NaN or infinite values" in caplog.text


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("window", [1], indirect=True)
def test_a_distance_that_is_no_number_ends_it() -> None:
    pairing = pair()
    before = states(pairing[1])
    assert [step.distance for step in run(pairing, distance=[1.0, 0.5, math.nan])] == [1.0, 0.5]
    now = states(pairing[1])
    assert not same(before[0], now[0])
    assert same(before[1], now[1])
    assert same(before[2], now[2])


def test_a_window_that_ends_it_leaves_the_one_before_it() -> None:
    overlapping, first = pair(), pair()
    run(overlapping, distance=[1.0, 0.5, math.nan])
    run(first, distance=[1.0, 0.5, 2.0, 2.0])
    assert all(same(a, b) for a, b in zip(states(overlapping[1]), states(first[1]), strict=True))


@pytest.mark.parametrize("gone", ["blocks.1.attn", "blocks.0.mlp"])
def test_what_is_left_of_an_absent_sublayer_learns_too(gone: str) -> None:
    teacher = network(0)
    widths = describe(teacher).widths
    student = resized(teacher, widths | {gone: absent(widths[gone])}).eval()
    before, left = gap(teacher, student, images(2)), student.get_submodule(gone)
    curve = run((teacher, student), LONG)
    assert left.bias.abs().min() > 0
    assert gap(teacher, student, images(2)) == pytest.approx(min(step.distance for step in curve))
    assert gap(teacher, student, images(2)) < 0.7 * before


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("batch", [5, 12, 24])
def test_any_number_of_steps_has_a_schedule(epochs: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 to 30 steps, 10 among them, of which a tenth is one."""
    monkeypatch.setattr(healing, "BATCH", batch)
    assert len(run(pair(), replace(SETTINGS, epochs=epochs))) == 4


def test_seeds_decide_and_global_generators_stay() -> None:
    pairings = [pair() for _ in range(3)]
    before = torch.get_rng_state()
    curves = [run(pairing, seed=seed) for pairing, seed in zip(pairings, (0, 0, 1), strict=True)]
    assert curves[0] == curves[1] != curves[2]
    assert torch.equal(before, torch.get_rng_state())


def test_streams_on_disk_give_the_same() -> None:
    assert run(pair(), store=Spool) == run(pair())


def test_progress_is_told_by_block() -> None:
    told: list[None] = []
    run(pair(), advance=lambda: told.append(None))
    assert len(told) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HealSettings(**wrong)
