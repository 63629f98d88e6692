"""Images and labels that cannot be used."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import gohsp
from gohsp import models
from gohsp.config import CalibrationSettings, DataSettings
from gohsp.errors import ConfigError, DataError
from gohsp.evaluation import evaluate
from refusals import Refusal

TITLE = "Data"


def model(*names: str) -> nn.Module:
    """A tiny classifier of these classes."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    made = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=len(names) or 2)
    if names:
        models.set_class_names(made, names)
    return made


def image(path: Path) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def images(root: Path) -> Path:
    """Write two classes, in two splits."""
    for split in ("train", "validation"):
        for name in ("ant", "bee"):
            image(root / split / name / "0.png")
    return root


def run(source: object, folder: Path, pruned: nn.Module | None = None) -> object:
    """Begin a run that fine-tunes."""
    config = gohsp.Config(method="finetune")
    return gohsp.run(pruned or model(), source, "params=-20%", folder / "run", config=config)  # type: ignore[arg-type]


def stray_class(root: Path) -> object:
    """A class in the validation images alone."""
    image(images(root) / "validation" / "wasp" / "0.png")
    return run(str(root), root)


def nested(root: Path) -> object:
    """A folder of images in a class folder that holds some itself."""
    image(images(root) / "train" / "ant" / "large" / "0.png")
    return run(str(root), root)


def looped(root: Path) -> object:
    """A link back to a folder that holds it."""
    (images(root) / "train" / "ant" / "all").symlink_to(root / "train")
    return run(str(root), root)


def one_class(root: Path) -> object:
    """A single class folder in both splits."""
    for split in ("train", "validation"):
        image(root / split / "ant" / "0.png")
        image(root / split / "ant" / "1.png")
    return run(str(root), root)


def source_is_file(root: Path) -> object:
    """An archive that was not unpacked."""
    (root / "images.zip").touch()
    return run(str(root / "images.zip"), root)


def split_is_file(root: Path) -> object:
    """A file in a split's place."""
    image(root / "validation" / "ant" / "0.png")
    (root / "train").touch()
    return run(str(root), root)


def no_text(root: Path) -> object:
    """A class folder whose name is no UTF-8."""
    os.mkdir(os.fsencode(images(root) / "train") + b"/caf\xe9")
    return run(str(root), root)


def shard(root: Path, *labels: str) -> object:
    """A shard of one image for each label, as both splits."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(root / "train-validation-0.tar", "w") as tar:
        for index, label in enumerate(labels):
            for extension, content in (("png", picture.getvalue()), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{index}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return run(f"wds/{root}", root)


PICTURES = torch.zeros(2, 3, 8, 8)


def scored(batch: Any) -> object:
    """Score a tiny model of two classes on one batch."""
    return evaluate(model(), [batch])


CASES = (
    Refusal("an empty source", lambda root: run("", root), DataError, "source is ''"),
    Refusal("a source that is no text", lambda root: run(None, root), DataError, "source is None"),
    Refusal("a source that is a file", source_is_file, DataError, "is a file"),
    Refusal("a split that is a file", split_is_file, DataError, "is a file"),
    Refusal("a class in the validation images alone", stray_class, DataError, "'wasp'"),
    Refusal(
        "classes that the model does not know",
        lambda root: run(str(images(root)), root, model("ant", "wasp")),
        DataError,
        "'bee'; it has 'ant', 'wasp'",
    ),
    Refusal("one class", one_class, DataError, "of one class"),
    Refusal("images beside folders of images", nested, DataError, "beside its class folders"),
    Refusal("a folder with a link to itself", looped, DataError, "one and the same"),
    Refusal("a class folder whose name is no text", no_text, DataError, r"caf\xe9"),
    Refusal("shards with numbers and words for labels", lambda root: shard(root, "ant", "3"), DataError, "3 and 'ant'"),
    Refusal(
        "a data set in place of a DataLoader",
        lambda _: gohsp.prune(model(), TensorDataset(torch.zeros(2, 3, 8, 8)), "params=-20%"),  # type: ignore[arg-type]
        DataError,
        "DataLoader(dataset, batch_size=64, shuffle=True)",
    ),
    Refusal(
        "a label that the model has no class for",
        lambda _: scored((PICTURES, torch.tensor([0, 2]))),
        DataError,
        "whole numbers [B] from 0 to 1, for the model's 2 classes",
    ),
    Refusal(
        "images without labels, to score on", lambda _: scored(PICTURES), DataError, "images [B, C, H, W] and labels"
    ),
    Refusal("class names that are too few", lambda _: models.set_class_names(model(), ["ant"]), DataError, "2 outputs"),
    Refusal("half an image", lambda _: CalibrationSettings(holdout=0.5), ConfigError, "calibration.holdout"),  # type: ignore[arg-type]
    Refusal("a split without a name", lambda _: DataSettings(train_split=" "), ConfigError, "train_split"),
)
