"""Scores against hand counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gohsp import data
from gohsp.errors import DataError, NonFiniteError
from gohsp.evaluation import Metrics, evaluate


class FirstRow(nn.Module):
    """Takes the image's first row of pixels for logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # tells the device

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.scale * images[:, 0, 0]


def rows(*logits: list[float]) -> Tensor:
    return torch.tensor(logits)[:, None, None, :]


def test_hand_counts_over_uneven_batches():
    seven = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    batches = [
        (rows(seven, seven, seven), torch.tensor([0, 4, 5])),  # first, fifth, sixth
        (rows([0.0] * 6 + [100.0]), torch.tensor([6])),
    ]
    model, steps = FirstRow().train(), []
    metrics = evaluate(model, batches, advance=lambda: steps.append(1))
    logsumexp = math.log(sum(math.exp(x) for x in seven))
    loss = ((logsumexp - 6) + (logsumexp - 2) + (logsumexp - 1) + 0) / 4
    assert (metrics.top1, metrics.top5, metrics.n) == (50.0, 75.0, 4)
    assert metrics.loss == pytest.approx(loss, rel=1e-6)
    assert len(steps) == 2
    assert model.training


def test_fewer_than_five_classes():
    metrics = evaluate(FirstRow(), [(rows([0.0, 1.0, 2.0]), torch.tensor([0]))])
    assert (metrics.top1, metrics.top5) == (0.0, 100.0)


def test_reduced_precision_is_used():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    seen = []
    model[1].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    batches = [(torch.randn(2, 1, 2, 2), torch.tensor([0, 1]))]
    assert isinstance(evaluate(model, batches, precision=torch.bfloat16), Metrics)
    evaluate(model, batches)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("batches", [[], [(torch.empty(0), torch.empty(0, dtype=torch.int64))]])
def test_no_images_are_refused(batches):
    with pytest.raises(DataError, match="no images to evaluate on; check the split"):
        evaluate(FirstRow(), batches)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value: float):
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        evaluate(FirstRow(), [(rows([0.0, value]), torch.tensor([1]))])


def grey_folder(root: Path, readable: int, damaged: int) -> data.Split:
    """A split of 4 x 4 images, the damaged ones last."""
    (root / "train" / "ant").mkdir(parents=True)
    for i in range(readable):
        Image.new("L", (4, 4), 10 * i).save(root / "train" / "ant" / f"a{i}.png")
    for i in range(damaged):
        (root / "train" / "ant" / f"z{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    return data.open_split(data.DataSource(source=str(root)), "train")


PLAIN = data.eval_transform(
    data.Preprocessing(image_size=4, channels=1, mean=(0.0,), std=(1.0,), crop_pct=1.0, interpolation="nearest")
)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_nothing_but_unreadable_images_is_left_out(tmp_path: Path, workers: int):
    split = grey_folder(tmp_path, readable=4, damaged=1)
    loader = data.loader(split, transform=PLAIN, batch_size=2, shuffle=False, workers=workers)
    assert [len(labels) for _, labels in loader] == [2, 2, 0]
    assert evaluate(FirstRow(), loader).n == 4
    assert len(split.unreadable) == 1


def test_a_split_of_nothing_but_unreadable_images_is_refused(tmp_path: Path):
    split = grey_folder(tmp_path, readable=0, damaged=3)
    with pytest.raises(DataError, match="are unreadable, like all others"):
        evaluate(FirstRow(), data.loader(split, transform=PLAIN, batch_size=2, shuffle=False))
