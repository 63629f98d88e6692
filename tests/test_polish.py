from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import count

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gohsp import models
from gohsp.errors import RecipeError
from gohsp.polish import PolishEpoch, PolishSettings, polish

SETTINGS = PolishSettings(epochs=3, learning_rate=1e-3, batch_size=8)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    ).eval()


def pair() -> tuple[nn.Module, nn.Module]:
    """A teacher, and a student that is off by some noise."""
    teacher = network(0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return teacher, student


def images(seed: int, batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 3, 16, 16, generator=generator) for _ in range(batches)]


def views(seed: int) -> DataLoader[tuple[Tensor, ...]]:
    rows = torch.cat(images(seed))
    return DataLoader(TensorDataset(rows, torch.zeros(len(rows))), batch_size=8)


def gap(teacher: nn.Module, student: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        a, b = (torch.cat([model(x) for x in batches]).log_softmax(-1) for model in (teacher, student))
    return float(nn.functional.kl_div(b, a, reduction="batchmean", log_target=True))


def polished(settings: PolishSettings, divergence: list[float] | None = None) -> tuple[nn.Module, list[PolishEpoch]]:
    teacher, student = pair()
    told = count()
    curve = polish(
        student,
        models.stages(student),
        models.stages(teacher),
        views(1),
        settings,
        divergence=lambda: gap(teacher, student, images(2)) if divergence is None else divergence[next(told)],
    )
    return student, curve


def test_it_comes_closer_on_images_it_has_not_seen() -> None:
    teacher, before = pair()
    student, curve = polished(SETTINGS)
    assert [epoch.epoch for epoch in curve] == [0, 1, 2, 3]
    assert curve[0].kl == pytest.approx(gap(teacher, before, images(2)))
    assert min(epoch.kl for epoch in curve) == pytest.approx(gap(teacher, student, images(2)), rel=1e-4)
    assert gap(teacher, student, images(2)) < 0.7 * gap(teacher, before, images(2))


def test_features_add_to_the_loss() -> None:
    with_features = polished(replace(SETTINGS, features=10.0))[1]
    without = polished(replace(SETTINGS, features=0.0))[1]
    assert with_features[-1].train_loss > without[-1].train_loss  # pyrefly: ignore[unsupported-operation]


@pytest.mark.parametrize(("divergence", "best"), [([1.0, 2.0, 3.0, 4.0], 0), ([4.0, 3.0, 1.0, 2.0], 2)])
def test_the_best_epoch_is_kept(divergence: list[float], best: int) -> None:
    student, curve = polished(SETTINGS, divergence)
    assert [epoch.kl for epoch in curve] == divergence
    # An epoch's weights depend on those before it and the seed alone, so that stopping there gives them again.
    expected = pair()[1] if best == 0 else polished(SETTINGS, [4.0, 3.0, 1.0, 5.0])[0]
    same = zip(student.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    last = polished(SETTINGS, [4.0, 3.0, 2.0, 1.0])[0]
    assert any(
        not torch.equal(a, b) for a, b in zip(student.state_dict().values(), last.state_dict().values(), strict=True)
    )


def test_a_loss_that_blows_up_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    student, curve = polished(replace(SETTINGS, learning_rate=1e30, mixup=0.0))
    assert all(torch.isfinite(v).all() for v in student.state_dict().values())
    assert len(curve) < 4
    assert "NaN or infinite" in caplog.text


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("batch", [8, 12, 24])
def test_any_number_of_steps_has_a_schedule(epochs: int, batch: int) -> None:
    """1 to 21 steps."""
    teacher, student = pair()
    rows = torch.cat(images(1))
    curve = polish(
        student,
        models.stages(student),
        models.stages(teacher),
        DataLoader(TensorDataset(rows, torch.zeros(len(rows))), batch_size=batch),
        replace(SETTINGS, epochs=epochs),
        divergence=lambda: 0.0,
    )
    assert len(curve) == epochs + 1


def test_a_divergence_that_is_no_number_ends_it() -> None:
    student, curve = polished(SETTINGS, [1.0, math.nan])
    assert [epoch.kl for epoch in curve] == [1.0]
    same = zip(student.state_dict().values(), pair()[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_seeds_decide_and_global_generators_stay() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    teacher, student = pair()
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    stages = models.stages(student), models.stages(teacher)
    start = copy.deepcopy(student.state_dict())
    curves = []
    for seed in (0, 0, 1):
        student.load_state_dict(start)
        curves.append(
            polish(
                student,
                *stages,
                views(1),
                SETTINGS,
                divergence=lambda: gap(teacher, student, images(2)),
                seed=seed,
            )
        )
    assert curves[0] == curves[1] != curves[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"features": -1.0}, {"mixup": math.inf}],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        PolishSettings(**wrong)  # pyrefly: ignore[bad-argument-type]
