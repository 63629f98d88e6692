"""Where images come from: folders, Hugging Face datasets, webdataset shards, digits.

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
import re
import struct
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers import create_reader

from gohsp.errors import DataError, nearest

logger = logging.getLogger(__name__)

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
