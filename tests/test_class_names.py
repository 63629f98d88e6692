"""Class names, not positions, tie splits and models together; a run is resumed with the images it began with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import gohsp
from gohsp import cli, models
from gohsp.config import DataSettings, from_mapping
from gohsp.errors import CheckpointError, DataError, GohspError, RunError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
WIDTHS = {
    "blocks.0.attn": gohsp.AttentionWidths(heads=3, qk=4, vo=6),
    "blocks.0.mlp": gohsp.FfnWidths(units=50),
    "blocks.1.attn": gohsp.AttentionWidths(heads=4, qk=8, vo=8),
    "blocks.1.mlp": gohsp.FfnWidths(units=7),
}
COUNTS = {"ant": 4, "bee": 3, "cat": 2}
CONFIG = {
    "method": "finetune",
    "device": "cpu",
    "precision": "no",
    "calibration": {"images": 16},
    "finetune": {"epochs": 1},
    "training": {"batch_size": 8, "augment": "none"},
    "compare_dense": False,
}


def constant(answer: int, *, names: tuple[str, ...] | None = None, num_classes: int = 3) -> nn.Module:
    """A model that gives every image the same class, so that its accuracy is that class's share."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=num_classes)
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
        model.get_parameter("head.bias").zero_()[answer] = 1
    if names is not None:
        models.set_class_names(model, names)
    return model


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_split(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        for index in range(count):
            write_image(root / name / f"{index}.png", seed=index)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_split(tmp_path / "images" / "train", COUNTS)
    write_split(tmp_path / "images" / "val", COUNTS)
    return tmp_path / "images"


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[nn.Module, Path | str], float | str]:
    """The accuracy that the command line prints for a model and a source, or what it says on refusing."""

    def score(model: nn.Module, source: Path | str) -> float | str:
        gohsp.save(model, tmp_path / "model")
        capsys.readouterr()
        status = cli.main(["evaluate", str(tmp_path / "model"), "--data", str(source), "--json"])
        printed = capsys.readouterr()
        return json.loads(printed.out)["top1"] if status == 0 else printed.err

    return score


def prune(out: Path, source: Path | str, model: nn.Module | None = None, **options: Any) -> gohsp.RunResult:
    config = from_mapping(CONFIG | options.pop("config", {}))
    return gohsp.run(model or constant(0), str(source), "params=-20%", out, config=config, widths=WIDTHS, **options)


# Folders that are no classes


@pytest.mark.parametrize(
    "stray",
    [
        "__MACOSX/",
        "__MACOSX/ant/0.png",
        "@eaDir/ant/0.png",
        ".git/",
        ".ipynb_checkpoints/0.png",
        ".thumbnails/large/0.png",
        "ant/.ipynb_checkpoints/0-checkpoint.png",
        "ant/._0.png",
        "ant/Thumbs.db",
        "._.png",
        "aardvark/",
        "aardvark/notes/readme.txt",
    ],
)
@pytest.mark.parametrize("splits", [("val",), ("train", "val")], ids=" and ".join)
def test_a_stray_folder_or_file_moves_no_label(images: Path, score, stray: str, splits: tuple[str, ...]):
    for split in splits:
        if stray.endswith("/"):
            (images / split / stray).mkdir(parents=True)
        else:
            (images / split / stray).parent.mkdir(parents=True, exist_ok=True)
            write_image(images / "any.png")
            shutil.move(images / "any.png", images / split / stray)
    assert score(constant(1), images) == pytest.approx(100 / 3)


def test_folders_without_images_are_told(images: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    (images / "val" / "aardvark").mkdir()
    shutil.rmtree(images / "val" / "ant")
    (images / "val" / "ant").mkdir()
    assert prune(tmp_path / "run", images).report.data.class_names == ("ant", "bee", "cat")
    assert "val': no image (.png, .jpg, .jpeg) in 'aardvark', 'ant'" in caplog.text


def test_a_split_that_lacks_classes_is_numbered_as_the_training_split(images: Path, score):
    shutil.rmtree(images / "val" / "ant")
    assert [score(constant(answer), images) for answer in range(3)] == pytest.approx([0, 60, 40])
    write_image(images / "test" / "aardvark" / "0.png")  # another split's class numbers neither
    assert score(constant(1), images) == pytest.approx(60)


def test_a_link_to_a_class_folder_elsewhere_is_followed(images: Path, score, tmp_path: Path):
    shutil.move(images / "val" / "bee", tmp_path / "elsewhere")
    (images / "val" / "bee").symlink_to(tmp_path / "elsewhere")
    assert score(constant(1), images) == pytest.approx(100 / 3)


def test_a_link_to_the_training_split_is_the_training_split(images: Path, tmp_path: Path):
    shutil.rmtree(images / "val")
    (images / "val").symlink_to(images / "train")
    with pytest.raises(DataError, match="training and validation images are the same"):
        prune(tmp_path / "run", images)


# Names tie models and data together


def test_a_run_names_the_classes_that_it_trains(images: Path, tmp_path: Path, score):
    result = prune(tmp_path / "run", images, constant(0))
    names = ("ant", "bee", "cat")
    assert result.report.data.class_names == names
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_names"] == list(names)
    assert "ant, bee, cat" in (tmp_path / "run" / "report.html").read_text()
    loaded = gohsp.load(tmp_path / "run")
    assert models.class_names(loaded) == models.class_names(result.model) == names
    gohsp.save(loaded, tmp_path / "again")
    assert models.class_names(gohsp.load(tmp_path / "again")) == names
    shutil.move(images / "val" / "ant", images / "val" / "wasp")  # as many classes, in another order
    assert cli.main(["evaluate", str(tmp_path / "run"), "--data", str(images)]) == 1


def test_a_trained_new_classifier_is_named(tmp_path: Path, images: Path):
    config = from_mapping(CONFIG | {"model_arguments": SMALL, "dense": {"epochs": 1}, "finetune": {"epochs": 0}})
    model = "vit_tiny_patch16_224"
    gohsp.run(model, str(images), "params=-20%", tmp_path / "run", config=config, widths=WIDTHS)
    for folder in (tmp_path / "run", tmp_path / "run" / "dense"):
        assert models.class_names(gohsp.load(folder)) == ("ant", "bee", "cat")


@pytest.mark.parametrize("config", [{"finetune": {"epochs": 0}}, {"method": "oneshot"}], ids=["untrained", "oneshot"])
def test_a_classifier_that_is_not_trained_on_the_data_stays_nameless(images: Path, tmp_path: Path, config: dict):
    result = prune(tmp_path / "run", images, config=config)
    assert result.report.data.class_names is None
    assert models.class_names(result.model) is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_names"] is None


def test_labels_follow_the_models_names(images: Path, tmp_path: Path, score):
    names = ("cat", "dog", "bee", "ant")
    for answer, share in enumerate((2 / 9, 0, 3 / 9, 4 / 9)):
        model = constant(answer, names=names, num_classes=4)
        assert score(model, images) == pytest.approx(100 * share)
    for resident in (False, True):
        config = {"data": {"resident": resident}, "finetune": {"epochs": 0}}
        run = tmp_path / f"run-{resident}"
        content = prune(run, images, constant(2, names=names, num_classes=4), config=config).report
        assert content.dense.top1 == pytest.approx(100 / 3)
        assert content.data.class_names == names
    assert models.class_names(gohsp.load(tmp_path / "run-False")) == names


def test_classes_that_the_model_does_not_know_are_refused_by_name(images: Path, tmp_path: Path, score):
    model = constant(0, names=("ant", "bee", "Cat"))
    assert "have: 'cat'; it has 'ant', 'bee', 'Cat'" in str(score(model, images))
    with pytest.raises(DataError, match=r"not have: 'cat'"):
        prune(tmp_path / "run", images, model)
    write_image(images / "val" / "wasp" / "0.png")
    for validated in (constant(0), constant(0, num_classes=1000)):
        with pytest.raises(DataError, match=r"val' has images of classes .* not have: 'wasp'; it has 'ant'"):
            prune(tmp_path / "run", images, validated)
    assert not (tmp_path / "run").exists()
    prune(tmp_path / "oneshot", images, model, config={"method": "oneshot"})  # reads no label


def test_models_without_names_go_by_numbers_as_before(images: Path, score):
    shutil.move(images / "val" / "ant", images / "val" / "wasp")
    assert score(constant(3, num_classes=1000), images) == pytest.approx(400 / 9)
    assert "label 3, allowed: 0 to 2 (3 classes)" in str(score(constant(0), images))
    hub = constant(0)
    hub.pretrained_cfg |= {"label_names": ["n01440764", "n01443537"]}  # of the classifier that was replaced
    assert models.class_names(hub) is None
    assert isinstance(score(hub, images), str)


@pytest.mark.parametrize("named", [False, True])
def test_it_is_told_where_libraries_number_folders_differently(
    tmp_path: Path, score, named: bool, caplog: pytest.LogCaptureFixture
):
    """timm sorts without regard to case, torchvision by plain text."""
    for split in ("train", "val"):
        write_split(tmp_path / "data" / split, {"Zebra": 2, "bee": 1, "ant": 1})
    model = constant(0, names=("Zebra", "ant", "bee") if named else None)
    assert score(model, tmp_path / "data") == (50.0 if named else 25.0)
    told = "class 0 is 'ant'; in that of torchvision's ImageFolder it is 'Zebra'"
    assert caplog.text.count(told) == (not named)
    caplog.clear()
    prune(tmp_path / "run", tmp_path / "data", model, config={"finetune": {"epochs": 0}})
    assert caplog.text.count(told) == (not named)


@pytest.mark.parametrize("names", ["abc", ["ant", "bee"], ["ant", "ant", "bee"], ["ant", "bee", 3], {"ant": 1}, 7])
def test_class_names_of_a_damaged_folder_are_refused(tmp_path: Path, names: Any):
    gohsp.save(constant(0), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": names}))
    with pytest.raises(CheckpointError, match="class_names"):
        gohsp.load(tmp_path / "model")


def test_names_that_do_not_fit_a_model_are_refused():
    with pytest.raises(DataError, match="3 outputs"):
        models.set_class_names(constant(0), ("ant", "bee"))
    with pytest.raises(UnsupportedModelError, match="pretrained_cfg"):
        models.set_class_names(nn.Linear(1, 1), ("ant",))
    model = constant(0, names=("ant", "bee", "cat"))
    models.set_class_names(model, None)
    assert models.class_names(model) is None


# Resuming with other images


def interrupted(folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gohsp.report.write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, images, config=config)


def rename_image(train: Path) -> None:
    (train / "ant" / "0.png").rename(train / "ant" / "9.png")


def replace_image(train: Path) -> None:
    Image.new("L", (50, 50)).save(train / "ant" / "0.png")


def add_image(train: Path) -> None:
    write_image(train / "ant" / "9.png")


def move_image(train: Path) -> None:
    (train / "ant" / "0.png").rename(train / "bee" / "9.png")


def rename_class(train: Path) -> None:
    for split in ("train", "val"):
        (train.parent / split / "ant").rename(train.parent / split / "wasp")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_image, "data.train.names_and_sizes"),
        (replace_image, "data.train.names_and_sizes"),
        (add_image, "data.train.images = 9, now it is 10"),
        (move_image, "data.train.labels"),
        (rename_class, r"data.train.classes.0 = 'ant', now it is 'bee'"),
    ],
)
def test_a_run_is_not_resumed_with_other_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], said: str
):
    interrupted(tmp_path / "run", images, monkeypatch, finetune={"epochs": 0})
    kept = images.rename(tmp_path / "kept")
    shutil.copytree(kept, images)
    change(images / "train")
    with pytest.raises(RunError, match=said):
        prune(tmp_path / "run", images, config={"finetune": {"epochs": 0}}, resume=True)
    shutil.rmtree(images)
    shutil.copytree(kept, images)  # the same images, of another time
    prune(tmp_path / "run", images, config={"finetune": {"epochs": 0}}, resume=True)


def test_a_oneshot_run_is_not_resumed_with_other_images(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted(tmp_path / "run", images, monkeypatch, method="oneshot")
    replace_image(images / "val")  # which it does not read
    prune_again = {"config": {"method": "oneshot"}, "resume": True}
    replace_image(images / "train")
    with pytest.raises(RunError, match=r"data\.train\.names_and_sizes"):
        prune(tmp_path / "run", images, **prune_again)
    write_image(images / "train" / "ant" / "0.png")
    prune(tmp_path / "run", images, **prune_again)


# What the disk holds


def test_names_that_are_no_text_are_read_or_refused(images: Path, score):
    with open(os.fsencode(images / "val" / "ant") + b"/\xff.png", "wb") as file:
        file.write(b"damaged")
    assert score(constant(1), images) == pytest.approx(100 / 3)
    os.mkdir(os.fsencode(images / "val") + b"/\xff")
    assert r"val/\xff' is no UTF-8 text" in str(score(constant(1), images))


def test_class_folders_named_by_digits_of_other_scripts_are_sorted(images: Path, score):
    for split in ("train", "val"):
        (images / split / "ant").rename(images / split / "²")
    assert score(constant(2), images) == pytest.approx(400 / 9)


def test_pipes_are_no_images_and_broken_links_are_unreadable_ones(images: Path, score):
    os.mkfifo(images / "val" / "ant" / "pipe.png")
    (images / "val" / "ant" / "gone.png").symlink_to("nowhere.png")
    assert score(constant(1), images) == pytest.approx(100 / 3)


def test_a_folder_that_may_not_be_read_is_refused(images: Path, score, monkeypatch: pytest.MonkeyPatch):
    scandir = os.scandir

    def denied(path: Any = ".") -> Any:
        if str(path).endswith("ant"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "ant' cannot be read: [Errno 13] Permission denied" in str(score(constant(0), images))


@pytest.mark.parametrize(
    ("flag", "value"), [("--batch-size", "0"), ("--batch-size", "-1"), ("--workers", "-1"), ("--split", "../val")]
)
def test_values_that_mean_nothing_are_refused(
    images: Path, tmp_path: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]
):
    gohsp.save(constant(0), tmp_path / "model")
    assert cli.main(["evaluate", str(tmp_path / "model"), "--data", str(images), flag, value]) == 1
    assert value in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"strict": 1}, {"train_split": 3}, {"train_split": ""}])
def test_data_settings_that_mean_nothing_are_refused(values: dict[str, Any]):
    with pytest.raises(GohspError, match=next(iter(values))):
        DataSettings(**values)
