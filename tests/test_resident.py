from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from gohsp import data
from gohsp.config import from_mapping
from gohsp.data import DataSource, Preprocessing
from gohsp.data.resident import ResidentImages, ResidentLoader, random_views, resident_images
from gohsp.errors import DataError, GohspError

GREY = Preprocessing(
    image_size=8, channels=1, mean=(0.5,), std=(0.25,), crop_pct=1.0, interpolation="bilinear", crop_mode="center"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> ResidentImages:
    return resident_images(data.open_split(DataSource(source="digits"), "test"), GREY, CPU)


def test_pixels_and_labels_are_those_of_the_ordinary_loader(digits: ResidentImages) -> None:
    split = data.open_split(DataSource(source="digits"), "test")
    ordinary = data.loader(split, transform=data.eval_transform(GREY), batch_size=64, shuffle=False)
    for (images, labels), (expected, right) in zip(
        ResidentLoader(digits, batch_size=64, shuffle=False), ordinary, strict=True
    ):
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
        assert torch.equal(labels, right)


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own(digits: ResidentImages) -> None:
    loader = ResidentLoader(digits, batch_size=50, shuffle=True, seed=3)
    first, second = (torch.cat([images for images, _ in loader]) for _ in range(2))
    assert len(loader) == 8
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values)
    loader.set_epoch(0)
    assert torch.equal(first, torch.cat([images for images, _ in loader]))
    other = ResidentLoader(digits, batch_size=50, shuffle=True, seed=4)
    assert not torch.equal(first, torch.cat([images for images, _ in other]))


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [100, 100, 100, 60]), (True, [100, 100, 100])])
def test_the_last_batch(digits: ResidentImages, drop_last: bool, sizes: list[int]) -> None:
    loader = ResidentLoader(digits, batch_size=100, shuffle=True, drop_last=drop_last)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_processes_share_an_epoch(digits: ResidentImages) -> None:
    loaders = [ResidentLoader(digits, batch_size=32, shuffle=True, share=(i, 7)) for i in range(7)]
    parts = [torch.cat([images for images, _ in loader]).flatten(1) for loader in loaders]
    assert {len(part) for part in parts} == {360 // 7}
    assert {len(loader) for loader in loaders} == {2}
    whole = torch.cat([images for images, _ in ResidentLoader(digits, batch_size=360, shuffle=False)]).flatten(1)
    assert len(torch.cat(parts).unique(dim=0)) >= 0.98 * len(whole.unique(dim=0))


def test_views_are_crops_of_the_image() -> None:
    """On an image whose pixels are their own coordinates a view tells where it was cut."""
    line = torch.linspace(-1, 1, 64)
    x, y = line.expand(64, 64), line[:, None].expand(64, 64)
    images = torch.stack([x, y]).expand(500, 2, 64, 64)
    views = random_views(images, torch.Generator().manual_seed(0), mirror=True)
    across = (views[:, 0, 32, -1] - views[:, 0, 32, 0]) / 2
    down = (views[:, 1, -1, 32] - views[:, 1, 0, 32]) / 2
    area = across.abs() * down
    assert views.shape == images.shape
    assert views.abs().max() <= 1 + 1e-5  # nothing from beyond the edge
    assert 0.4 < (across < 0).float().mean() < 0.6
    assert (down > 0).all()
    assert 0.33 < area.min() < 0.45
    assert 0.9 < area.max() <= 1.001
    assert 0.74 < (across.abs() / down).min() < 0.85
    assert 1.2 < (across.abs() / down).max() < 1.35
    straight = random_views(images, torch.Generator().manual_seed(0), mirror=False)
    assert (straight[:, 0, 32, -1] > straight[:, 0, 32, 0]).all()


def test_light_augmentation_depends_on_the_epoch(digits: ResidentImages) -> None:
    loader = ResidentLoader(digits, batch_size=360, shuffle=False, augment=True, mirror=False)
    (first, labels), (second, same) = next(iter(loader)), next(iter(loader))
    assert torch.equal(labels, same)
    assert not torch.equal(first, second)
    assert first.shape == second.shape == (360, 1, 8, 8)


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "bee"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("L", (8, 8), 50 * i).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    split = data.open_split(DataSource(source=str(tmp_path)), "train")
    images = resident_images(split, GREY, CPU)
    assert images.pixels.shape == (3, 1, 8, 8)
    assert images.labels.tolist() == [0, 0, 0]
    assert split.unreadable == [3]
    with pytest.raises(DataError, match=r"3\.png"):
        resident_images(split, GREY, CPU, strict=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 4 images"):
        resident_images(data.open_split(DataSource(source=str(tmp_path)), "train"), GREY, CPU)


def test_strong_augmentation_is_refused() -> None:
    with pytest.raises(GohspError, match=r"data\.resident"):
        from_mapping({"data": {"resident": True}, "training": {"augment": "strong"}})
