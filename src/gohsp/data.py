"""Images in, batches out: where images come from, how they become tensors, and how they are batched.

A `DataSource` names a data set and its splits. `open_split` turns one split into a `Split`: random access
to decoded images and their labels, whatever the storage. `Preprocessing` says what a model expects of an
image; `eval_transform` and `train_transform` build it with timm. `loader` makes a reproducible, standard
`torch.utils.data.DataLoader` of the three; `calibration_images` draws images without touching a label.

Sources (`DataSource.source`):

- a folder of class folders, with or without split sub-folders (timm's folder reader);
- ``hfds/<hub id or local folder>``: Hugging Face datasets (``pip install 'gohsp[hf]'``), where a split may be
  a slice such as ``train[:90%]``;
- ``wds/<folder>``: webdataset shards (uncompressed tar files) on a local disk;
- ``digits``: scikit-learn's 1,797 grey 8x8 digits, for trials that finish in seconds.

The images are read through timm's *reader* and not through its ``ImageDataset``, which puts the next image
in the place of one it cannot decode.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import multiprocessing
import os
import random
import re
import struct
import tarfile
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers import create_reader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import Compose

from gohsp.errors import DataError, nearest

logger = logging.getLogger(__name__)

Augment = Literal["none", "light", "strong"]
Transform: TypeAlias = Callable[[Image.Image], Tensor]

CACHE_LIMIT = 2**30  # bytes of decoded pixels up to which `loader` keeps a split in memory by default

# What PIL and its plug-ins raise on damaged files; running out of memory is deliberately not among them.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImageError(DataError):
    """One image that cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set; its splits are opened by name.

    Attributes:
        source: A folder, ``hfds/...``, ``wds/...`` or ``digits``; see the module's documentation.
        image_key: ``hfds``: the image column; default: the only one of type Image. ``wds``: the image's
            extension; default: ``jpg``, ``jpeg``, ``png`` or ``webp``.
        label_key: ``hfds``: the label column; default: the only one of type ClassLabel. ``wds``: the field of
            the ``.json`` file; default: the ``.cls`` file.
    """

    source: str
    image_key: str | None = None
    label_key: str | None = None


class Split(ABC):
    """Random access to the images and labels of one split of a source.

    Attributes:
        name: The source and the split, as messages name them.
        mirrored_alike: Whether an image keeps its class when mirrored; False for digits.
    """

    mirrored_alike = True

    def __init__(self, name: str, size: int) -> None:
        if size == 0:
            raise DataError(f"{name} holds no images; name a source and a split that hold some")
        self.name = name
        self._size = size
        self._decoded: list[np.ndarray | UnreadableImageError] | None = None
        # A flag an image, shared with worker processes; set twice, it counts once, so it needs no lock.
        self._unreadable = multiprocessing.RawArray("b", size)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Open image ``index``; its pixels need not be decoded yet."""

    @abstractmethod
    def filename(self, index: int) -> str:
        """Name image ``index`` for messages."""

    @property
    @abstractmethod
    def raw_labels(self) -> Sequence[Any]:
        """The labels as they are stored, unchecked, without reading an image.

        Raises:
            DataError: The source has no labels, or does not say which they are.
        """

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of their labels; None where the source does not know them."""

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None where the source does not know it."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def unreadable(self) -> list[int]:
        """The indices of the images that could not be decoded so far, in any process."""
        return [index for index, flag in enumerate(self._unreadable) if flag]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return self.image(index), self.raw_labels[index]

    def image(self, index: int) -> Image.Image:
        """Return image ``index``, decoded, in mode ``"L"`` if it is grey and ``"RGB"`` otherwise.

        Raises:
            UnreadableImageError: The image cannot be decoded.
        """
        decoded = self._decode(index) if self._decoded is None else self._decoded[index]
        if isinstance(decoded, UnreadableImageError):
            if not self._unreadable[index]:
                self._unreadable[index] = 1
                logger.warning("%s", decoded)
            raise decoded
        return decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded)

    def preload(self) -> None:
        """Decode every image once, in threads, and keep the pixels (uint8) in memory from now on."""
        if self._decoded is not None:
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            self._decoded = list(pool.map(self._pixels, range(len(self))))

    def decoded_bytes(self) -> int:
        """Estimate the memory that `preload` would take, from the headers of up to 32 images."""
        sizes = []
        for index in range(0, len(self), -(-len(self) // 32)):
            try:
                with self.open(index) as image:
                    sizes.append(image.width * image.height * (1 if image.mode == "L" else 3))
            except _DECODE_ERRORS:
                continue  # counted and named when the image is read
        return len(self) * sum(sizes) // max(1, len(sizes))

    def labels(self, num_classes: int | None = None) -> np.ndarray:
        """Return all labels after checking each.

        Args:
            num_classes: The number of classes that the labels must fit. Default: the source's own; where the
                source knows none either, a label must only be a non-negative integer.

        Returns:
            int64 array [len(self)].

        Raises:
            DataError: A label is missing, not an integer or out of range.
        """
        limit = self.num_classes if num_classes is None else num_classes
        labels = self.raw_labels
        for index, label in enumerate(labels):
            fits = isinstance(label, (int, np.integer)) and label >= 0 and (limit is None or label < limit)
            if not fits:
                allowed = "non-negative integers" if limit is None else f"0 to {limit - 1} ({limit} classes)"
                raise DataError(
                    f"image {index} ({self.filename(index)}) of {self.name} has the label {label!r}, "
                    f"allowed: {allowed}; mend the label or set the model's number of classes"
                )
        return np.asarray(labels, dtype=np.int64)

    def _decode(self, index: int) -> Image.Image | UnreadableImageError:
        try:
            with self.open(index) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode!r}: PIL would clip its 16 or 32 bits to 8; convert it")
                image.load()
                return image if image.mode in ("L", "RGB") else image.convert("RGB")
        except _DECODE_ERRORS as error:
            return UnreadableImageError(
                f"image {index} ({self.filename(index)}) of {self.name} cannot be read: {error}"
            )

    def _pixels(self, index: int) -> np.ndarray | UnreadableImageError:
        decoded = self._decode(index)
        return decoded if isinstance(decoded, UnreadableImageError) else np.array(decoded)


def open_split(source: DataSource, split: str) -> Split:
    """Open one split of a source.

    Args:
        source: Where the images are.
        split: The split's name; for ``hfds`` also a slice (``train[:90%]``) or a sum of slices.

    Returns:
        The split.

    Raises:
        DataError: The source or the split does not exist, is empty or cannot be understood; the message names
            the splits that exist where they are known.
    """
    prefix, _, rest = source.source.partition("/")
    if prefix.lower() == "hfds" and rest:
        return _HfdsSplit(source, rest, split)
    if re.search(r"[\[+]", split):
        raise DataError(f"split '{split}': only 'hfds/...' sources can be sliced, not '{source.source}'")
    if prefix.lower() == "wds" and rest:
        return _WdsSplit(source, Path(rest).expanduser(), split)
    if source.image_key is not None or source.label_key is not None:
        raise DataError(
            f"image_key={source.image_key!r}, label_key={source.label_key!r}: only 'hfds/...' and 'wds/...' "
            f"sources have keys, '{source.source}' has none; leave both out"
        )
    if source.source == "digits":
        return _DigitsSplit(split)
    return _FolderSplit(Path(source.source).expanduser(), split)


class _FolderSplit(Split):
    """Class folders of image files, read by timm's folder reader."""

    SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"), ("test",))

    def __init__(self, root: Path, split: str) -> None:
        if not root.is_dir():
            raise DataError(f"source '{root}': no such folder; a source is a folder, 'hfds/...', 'wds/...' or 'digits'")
        existing = [root / name for group in self.SYNONYMS for name in group if (root / name).is_dir()]
        folder = self._split_folder(root, split, existing)
        try:
            self._reader: Any = create_reader("", root=str(folder))
        except RuntimeError as error:
            raise DataError(f"folder '{folder}' holds no images: {error}") from error
        super().__init__(f"folder '{folder}'", len(self._reader))
        found = set(self._reader.class_to_idx)
        if "" in found and len(found) > 1:
            raise DataError(f"{self.name} has images beside its class folders; move them into one of these")
        # The reader numbers the classes that it finds in this split. A class absent from it would shift the
        # numbers of all that follow, so the classes of all splits are numbered together.
        known = {path.name for other in existing for path in other.glob("[!.]*/")}
        if folder in existing and found < known:
            names = sorted(known, key=_natural_key)
            self._reader = create_reader("", root=str(folder), class_map={n: i for i, n in enumerate(names)})

    @classmethod
    def _split_folder(cls, root: Path, split: str, existing: list[Path]) -> Path:
        synonyms = next((group for group in cls.SYNONYMS if split in group), ())
        for name in (split, *synonyms):
            if (root / name).is_dir():
                return root / name
        # timm would read the whole folder here, and so mix the splits.
        if existing:
            hint = nearest(split, [path.name for path in existing])
            raise DataError(f"folder '{root}' has no split '{split}'; {hint}")
        logger.warning("folder '%s' has no split folders: each split, '%s' too, is all of it", root, split)
        return root

    def open(self, index: int) -> Image.Image:
        return Image.open(self._reader.samples[index][0])

    def filename(self, index: int) -> str:
        return self._reader.filename(index)

    @functools.cached_property
    def raw_labels(self) -> Sequence[Any]:
        if self.class_names is None:
            raise DataError(f"{self.name} has no class folders, hence no labels; put its images in such folders")
        return [label for _, label in self._reader.samples]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = tuple(self._reader.class_to_idx)
        return None if names == ("",) else names


def _natural_key(name: str) -> list[int | str]:
    """Sort as timm does: ``class2`` before ``class10``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


class _HfdsSplit(Split):
    """A Hugging Face data set, from the hub or a local folder.

    timm's ``hfds`` reader fetches the label with every image; here the two columns are held apart, so that
    images without labels can be read.
    """

    def __init__(self, source: DataSource, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"source '{source.source}' needs the package 'datasets': pip install 'gohsp[hf]'"
            ) from error
        try:
            builder = datasets.load_dataset_builder(name)
            builder.download_and_prepare()
        except Exception as error:  # datasets, pyarrow, fsspec and the hub client each raise their own
            raise DataError(f"source '{source.source}' cannot be loaded: {error}") from error
        named = {part.partition("[")[0].strip() for part in split.split("+")}
        if unknown := sorted(named - {*builder.info.splits, "all"}):
            hint = nearest(unknown[0], builder.info.splits)
            raise DataError(f"source '{source.source}' has no split '{unknown[0]}'; {hint}")
        try:
            self._rows = builder.as_dataset(split=split)
        except Exception as error:  # a malformed or empty slice raises one of several types
            raise DataError(f"split '{split}' of '{source.source}' cannot be read: {error}") from error
        super().__init__(f"'{source.source}' split '{split}'", len(self._rows))
        self._label_key = source.label_key
        self._image_key = self._column("image_key", source.image_key, datasets.Image)
        images = self._rows.select_columns([self._image_key])
        self._images = images.cast_column(self._image_key, datasets.Image(decode=False))

    def _column(self, field: str, given: str | None, feature: type) -> str:
        """Return the column that is given, or the only one of the feature's type."""
        features = self._rows.features
        fitting = [name for name, kind in features.items() if isinstance(kind, feature)]
        if given is None and len(fitting) == 1:
            return fitting[0]
        if given is not None and given in features:
            return given
        problem = f"has no column '{given}'" if given else f"has {len(fitting)} {feature.__name__} columns, not one"
        columns = ", ".join(f"'{name}'" for name in features)
        raise DataError(f"{self.name} {problem}; set image_key and label_key: {field} to one of {columns}")

    def open(self, index: int) -> Image.Image:
        image = self._images[index][self._image_key]
        if image is None:
            raise ValueError("the row holds no image")
        return Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))

    def filename(self, index: int) -> str:
        image = self._images[index][self._image_key]
        return (image and image["path"]) or f"row {index}"

    @functools.cached_property
    def raw_labels(self) -> Sequence[Any]:
        key = self._label_column()
        return self._rows.select_columns([key])[:][key]

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        names = getattr(self._rows.features[self._label_column()], "names", None)
        return None if names is None else tuple(names)

    def _label_column(self) -> str:
        from datasets import ClassLabel

        return self._column("label_key", self._label_key, ClassLabel)


class _TarImage(NamedTuple):
    """Where the files of one sample lie: (offset, size) in bytes."""

    shard: Path
    key: str
    image: tuple[int, int]
    label: tuple[int, int] | None


class _WdsSplit(Split):
    """webdataset shards on a local disk, read by position.

    The tar headers are read once, which makes the samples countable and shufflable as a whole: every epoch
    sees each image once, with any number of workers, and labels are checked before any work.
    """

    IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

    def __init__(self, source: DataSource, root: Path, split: str) -> None:
        shards = sorted(root.glob("*.tar"))
        if not shards:
            raise DataError(f"source '{source.source}': folder '{root}' holds no .tar files")
        chosen = [shard for shard in shards if split in re.split(r"[-_.]", shard.stem)]
        if not chosen:
            raise DataError(
                f"source '{source.source}' has no shards of split '{split}': a shard's name must contain it, "
                f"as in '{split}-0000.tar'; the folder holds '{shards[0].name}' to '{shards[-1].name}'"
            )
        extensions = (source.image_key,) if source.image_key else self.IMAGE_EXTENSIONS
        self._label_key = source.label_key
        label_extension = "cls" if source.label_key is None else "json"
        self._samples = [s for shard in chosen for s in _tar_images(shard, extensions, label_extension)]
        super().__init__(f"'{source.source}' split '{split}'", len(self._samples))

    def open(self, index: int) -> Image.Image:
        sample = self._samples[index]
        return Image.open(io.BytesIO(_read(sample.shard, sample.image)))

    def filename(self, index: int) -> str:
        return f"{self._samples[index].shard.name}:{self._samples[index].key}"

    @functools.cached_property
    def raw_labels(self) -> Sequence[Any]:
        return [self._label(sample) for sample in self._samples]

    def _label(self, sample: _TarImage) -> Any:
        if sample.label is None:
            return None
        content = json.loads(_read(sample.shard, sample.label))
        return content if self._label_key is None else content.get(self._label_key)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None


def _tar_images(shard: Path, image_extensions: Sequence[str], label_extension: str) -> Iterator[_TarImage]:
    """Yield the samples of a shard: files that share a path up to the first dot of its last part."""
    files: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isfile():
                    key = f"{folder}/{stem}" if folder else stem
                    files.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"shard '{shard}' cannot be read as an uncompressed tar file: {error}") from error
    for key, parts in files.items():
        image = next((parts[extension] for extension in image_extensions if extension in parts), None)
        if image is not None:
            yield _TarImage(shard, key, image, parts.get(label_extension))


def _read(path: Path, span: tuple[int, int]) -> bytes:
    offset, size = span
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


class _DigitsSplit(Split):
    """scikit-learn's digits, 70 / 10 / 20 % by a fixed stratified draw."""

    mirrored_alike = False
    SPLITS = ("train", "validation", "test")

    def __init__(self, split: str) -> None:
        if split not in self.SPLITS:
            raise DataError(f"source 'digits' has no split '{split}'; {nearest(split, self.SPLITS)}")
        from sklearn.datasets import load_digits  # scikit-learn takes a second to import
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        rest, test = train_test_split(
            np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
        )
        train, validation = train_test_split(rest, test_size=180, stratify=digits.target[rest], random_state=0)
        self._rows = np.sort({"train": train, "validation": validation, "test": test}[split])
        self._pixels_by_row = np.round(digits.images[self._rows] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[self._rows].tolist()
        super().__init__(f"'digits' split '{split}'", len(self._rows))

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels_by_row[index])

    def filename(self, index: int) -> str:
        return f"digit {self._rows[index]}"

    @property
    def raw_labels(self) -> Sequence[Any]:
        return self._labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model expects of an image.

    Attributes:
        image_size: Side of the square input in pixels, or (height, width).
        channels: 3 (RGB) or 1 (grey).
        mean: Per channel, of pixels scaled to 0..1.
        std: Per channel, likewise.
        crop_pct: Share of the resized image's side that evaluation's centre crop keeps, in (0, 1].
        interpolation: ``nearest``, ``bilinear``, ``bicubic``, ``box``, ``hamming`` or ``lanczos``.
        crop_mode: timm's evaluation crop: ``center``, ``squash`` or ``border``.

    Raises:
        DataError: A value is out of its range, or the lengths of ``mean`` and ``std`` are not ``channels``.
    """

    image_size: int | tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"channels={self.channels}: images are read as grey (1) or RGB (3)")
        if not len(self.mean) == len(self.std) == self.channels:
            raise DataError(f"mean={self.mean} and std={self.std} must each have {self.channels} values, one a channel")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct={self.crop_pct}: allowed is a share in (0, 1]")
        for name, value, allowed in (
            (
                "interpolation",
                self.interpolation,
                ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
            ),
            ("crop_mode", self.crop_mode, ("center", "squash", "border")),
        ):
            if value not in allowed:
                raise DataError(f"{name}='{value}'; {nearest(value, allowed)}")

    @classmethod
    def from_model(cls, model: nn.Module) -> Preprocessing:
        """Read the preprocessing off a timm model.

        The size and the channels are those of the model as built, not those of its pretrained weights: a
        ``deit_tiny_patch16_224`` created with ``img_size=112`` evaluates at 112 px. A one-channel model gets
        the averages of the pretrained mean and std.

        Args:
            model: A model made by ``timm.create_model``.

        Raises:
            DataError: The model carries no timm configuration.
        """
        if not getattr(model, "pretrained_cfg", None):
            raise DataError(
                f"{type(model).__name__} has no timm pretrained_cfg to read mean, std and crop from; "
                "pass Preprocessing(image_size=..., channels=..., mean=..., ...) instead"
            )
        config: dict[str, Any] = resolve_model_data_config(model)
        height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
        convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        first = next(convolutions, None)
        channels = config["input_size"][0] if first is None else first.in_channels
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if channels == 1 and len(mean) > 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        return cls(
            image_size=height if height == width else (height, width),
            channels=channels,
            mean=mean,
            std=std,
            crop_pct=config["crop_pct"],
            interpolation=config["interpolation"],
            crop_mode=config["crop_mode"],
        )


def eval_transform(preprocessing: Preprocessing, *, normalize: bool = True) -> Transform:
    """Build the deterministic transform: resize, centre crop, scale to 0..1, normalise.

    Args:
        preprocessing: What the model expects.
        normalize: Whether to do the last two steps.

    Returns:
        A function from a PIL image of any mode to a float32 tensor [channels, height, width], uint8 without
        ``normalize``.
    """
    return _with_mode(
        preprocessing,
        create_transform(
            preprocessing.image_size,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            crop_pct=preprocessing.crop_pct,
            crop_mode=preprocessing.crop_mode,
            normalize=normalize,
        ),
    )


def train_transform(preprocessing: Preprocessing, *, augment: Augment = "light", mirror: bool = True) -> Transform:
    """Build the training transform.

    Args:
        preprocessing: What the model expects.
        augment: ``none``: as in evaluation. ``light``: a random crop of 35 to 100 % of the area, resized, and
            a random mirroring. ``strong``: ``light``, RandAugment and random erasing.
        mirror: Whether an image may be mirrored; pass `Split.mirrored_alike`.

    Returns:
        A function from a PIL image of any mode to a float32 tensor [channels, height, width]. It draws from
        the global generators of ``random``, numpy and torch, which `loader` seeds.

    Raises:
        DataError: ``augment`` is none of these.
    """
    if augment not in get_args(Augment):
        raise DataError(f"augment='{augment}'; {nearest(augment, get_args(Augment))}")
    if augment == "none":
        return eval_transform(preprocessing)
    strong = augment == "strong"
    return _with_mode(
        preprocessing,
        create_transform(
            preprocessing.image_size,
            is_training=True,
            scale=(0.35, 1.0),
            hflip=0.5 if mirror else 0.0,
            color_jitter=None,  # pyrefly: ignore[bad-argument-type] (timm tests for None)
            # DeiT's setting, its noisy magnitude capped at 9: at 10, posterising keeps no bit, which makes a
            # black image in older versions of Pillow and raises in newer ones.
            auto_augment="rand-m9-mstd0.5-mmax9-inc1" if strong else None,
            re_prob=0.25 if strong else 0.0,
            re_mode="pixel",
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
        ),
    )


def _with_mode(preprocessing: Preprocessing, transform: Any) -> Transform:
    mode = "L" if preprocessing.channels == 1 else "RGB"
    return Compose([functools.partial(_convert, mode=mode), *transform.transforms])


def _convert(image: Image.Image, *, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # PIL would copy an image that has the mode


def loader(
    split: Split,
    *,
    transform: Transform,
    batch_size: int,
    shuffle: bool,
    workers: int = 0,
    seed: int = 0,
    num_classes: int | None = None,
    strict: bool = False,
    drop_last: bool = False,
    cache: bool | None = None,
) -> DataLoader[Any]:
    """Make a reproducible loader of (images float32 [B, C, H, W], labels int64 [B]).

    Order and augmentation depend on ``seed``, the epoch and the batch, and on nothing else: the number of
    workers does not change a single pixel, and the global random generators are left as they were. Each
    ``iter()`` is one more epoch; ``loader.sampler.set_epoch(k)`` sets the next one, to resume a run.

    An image that cannot be decoded is left out of its batch, logged once, and listed in `Split.unreadable`. A batch
    may be empty for that reason: whoever iterates skips it.

    Args:
        split: The images and labels.
        transform: What makes a tensor [C, H, W] of an image.
        batch_size: Images a batch; a batch with unreadable images, and the last one, have fewer.
        shuffle: Whether each epoch has an order of its own.
        workers: Number of worker processes; 0 reads in this process.
        seed: A non-negative integer.
        num_classes: The model's number of classes, for the check of the labels. Default: the source's.
        strict: Whether an unreadable image raises.
        drop_last: Whether an incomplete last batch is left out.
        cache: Whether to decode all images now and keep them (`Split.preload`). Default: up to `CACHE_LIMIT`.

    Raises:
        DataError: A label does not fit; ``drop_last`` leaves no batch. While iterating: all images of the split
            turn out to be unreadable, or one is and ``strict`` is set.
    """
    labels = split.labels(num_classes)
    if drop_last and len(split) < batch_size:
        raise DataError(f"{split.name} has {len(split)} images, less than one batch of {batch_size} (drop_last)")
    if split.decoded_bytes() <= CACHE_LIMIT if cache is None else cache:
        split.preload()
    return DataLoader(
        _Batches(split, labels, transform, strict),
        batch_size=batch_size,
        sampler=_SeededSampler(len(split), shuffle, seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(seed),  # else each epoch draws from the global generator
    )


class _SeededSampler(Sampler[tuple[int, int]]):
    """Yields (image index, seed) pairs that depend on the seed and the epoch only."""

    def __init__(self, size: int, shuffle: bool, seed: int) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        self.epoch += 1
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        seeds = torch.randint(2**32, (self.size,), generator=generator)
        return zip(order.tolist(), seeds.tolist(), strict=True)


class _Batches(Dataset[Any]):
    """Reads a whole batch at once, so that the generators are seeded once a batch, in whichever process."""

    def __init__(self, split: Split, labels: np.ndarray, transform: Transform, strict: bool) -> None:
        self.split = split
        self.labels = labels
        self.transform = transform
        self.strict = strict

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        samples = []
        with _seeded(keys[0][1]):
            for index, _ in keys:
                try:
                    image = self.split.image(index)
                except UnreadableImageError:
                    if self.strict:
                        raise
                    continue
                samples.append((self.transform(image), int(self.labels[index])))
        if not samples and len(self.split.unreadable) == len(self.split):
            raise DataError(
                f"all {len(keys)} images of a batch of {self.split.name} are unreadable, like all others of it, the "
                f"first being image {keys[0][0]} ({self.split.filename(keys[0][0])}); mend them"
            )
        return samples


def _collate(samples: Sequence[tuple[Tensor, int]]) -> Any:
    """Stack a batch; torch's own function refuses the empty list that a batch of unreadable images leaves."""
    return default_collate(list(samples)) if samples else (torch.empty(0), torch.empty(0, dtype=torch.int64))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that timm's transforms draw from, and restore them afterwards.

    Restoring keeps a model's dropout independent of how the images were read.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm draws from it)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


class Spool(MutableSequence[Tensor]):
    """A list of tensors that lies on disk, so that memory does not grow with the number of images.

    Args:
        folder: Where; None for the system's temporary folder. The files go with the spool.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=".gohsp-", dir=folder)
        self._files: list[Path] = []
        self._written = 0

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return load_file(self._files[index])["x"]

    def __setitem__(self, index: Any, value: Any) -> None:
        fresh = self._write(value)
        self._files[index].unlink()
        self._files[index] = fresh

    def __delitem__(self, index: Any) -> None:
        self._files.pop(index).unlink()

    def insert(self, index: int, value: Tensor) -> None:
        """Write a tensor and put it before ``index``."""
        self._files.insert(index, self._write(value))

    def _write(self, value: Tensor) -> Path:
        # A new name each time: a tensor read before may still be mapped from the old file.
        path = Path(self._folder.name) / f"{self._written}.safetensors"
        self._written += 1
        save_file({"x": value.detach().cpu().contiguous()}, path)
        return path


def calibration_images(
    source: DataSource,
    split: str,
    count: int,
    *,
    transform: Transform,
    seed: int = 0,
    batch_size: int = 64,
    skip: int = 0,
    strict: bool = False,
    store: Callable[[], MutableSequence[Tensor]] = list,
) -> MutableSequence[Tensor]:
    """Draw a fixed random subset of a split's images; no label is read, so the source needs none.

    Args:
        source: Where the images are.
        split: The split to draw from.
        count: The number of images; unreadable ones are replaced by further draws. If the split has fewer,
            all are used and a warning is logged.
        transform: What makes a tensor [C, H, W] of an image, usually `eval_transform`.
        seed: A non-negative integer; the same seed draws the same images.
        batch_size: Images a batch.
        skip: How many images of the draw to pass over first: another subset than that of the first ``skip``.
        strict: Whether an unreadable image raises.
        store: Makes an empty place for the batches: ``list`` for memory, :class:`Spool` for disk.

    Returns:
        Batches, float32 [B, C, H, W]; the last may be smaller.

    Raises:
        DataError: ``count`` or ``batch_size`` is not positive; the source cannot be opened; no image can be
            read, or one cannot and ``strict`` is set.
    """
    if count < 1 or batch_size < 1:
        raise DataError(f"count={count}, batch_size={batch_size}: both must be at least 1")
    images = open_split(source, split)
    batches, pending, found = store(), [], 0
    with _seeded(seed % 2**32):
        for index in _draw(images, seed)[skip:]:
            if found == count:
                break
            try:
                pending.append(transform(images.image(index)))
            except UnreadableImageError:
                if strict:
                    raise
                continue  # logged by the split
            found += 1
            if len(pending) == batch_size:
                batches.append(torch.stack(pending))
                pending = []
    if pending:
        batches.append(torch.stack(pending))
    if not found:
        raise DataError(f"none of the {len(images)} images of {images.name} can be read; mend the source")
    if found < count:
        logger.warning("%s has %d readable images, %d were asked for", images.name, found, count)
    return batches


def drawn(source: DataSource, split: str, count: int, *, seed: int = 0) -> Split:
    """Make a split of the images that `calibration_images` draws first; every label is 0, none is read.

    Args:
        source: Where the images are.
        split: The split to draw from.
        count: The number of images; unreadable ones count. All, if the split has fewer.
        seed: A non-negative integer, as for `calibration_images`.

    Raises:
        DataError: ``count`` is not positive; the source cannot be opened.
    """
    if count < 1:
        raise DataError(f"count={count}: it must be at least 1")
    return _Drawn(open_split(source, split), count, seed)


class _Drawn(Split):
    """Some images of another split, without its labels."""

    def __init__(self, images: Split, count: int, seed: int) -> None:
        self._images, self._indices = images, _draw(images, seed)[:count]
        super().__init__(f"{len(self._indices)} images of {images.name}", len(self._indices))
        self.mirrored_alike = images.mirrored_alike

    def open(self, index: int) -> Image.Image:
        return self._images.open(self._indices[index])

    def filename(self, index: int) -> str:
        return self._images.filename(self._indices[index])

    @property
    def raw_labels(self) -> Sequence[Any]:
        return [0] * len(self)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None


def _draw(images: Split, seed: int) -> list[int]:
    """All indices, in the order in which calibration draws them."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
