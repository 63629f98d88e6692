"""Where images come from: folders, Hugging Face datasets, webdataset shards, digits."""

from __future__ import annotations

import functools
import hashlib
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gohsp.data import folders
from gohsp.errors import DataError, listed, nearest, require_packages

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


_FORMS = "a source is a folder, 'hfds/...', 'wds/...' or 'digits'"

SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"), ("test",))
"""What folders and shards of a split are called. The first that a source has numbers the classes of all."""


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

    Raises:
        DataError: ``source`` or a key is no text, or an empty one.
    """

    source: str
    image_key: str | None = None
    label_key: str | None = None

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if (given is not None or name == "source") and not _is_text(given):
                allowed = _FORMS if name == "source" else "a key is the name of a column, field or extension"
                raise DataError(f"{name} is {given!r}; give a text that says something: {allowed}")


class Split(ABC):
    """Random access to the images and labels of one split of a source.

    Attributes:
        name: The source and the split, as messages name them.
        mirrored_alike: Whether an image keeps its class when mirrored; False for digits.
        sorts_names: Whether classes are numbered in the order of their names, and not by the source.
    """

    mirrored_alike = True
    sorts_names = False

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

    @abstractmethod
    def stored(self) -> Iterable[tuple[str, int]]:
        """Yield the name of every image and its size in bytes as it is stored, -1 if unknown; no image is read."""

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the names and sizes of all images: another one tells that these are other images."""
        found = hashlib.blake2b(digest_size=16)
        for name, size in self.stored():
            found.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return found.hexdigest()

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

    def labels(self, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> np.ndarray:
        """Return all labels after checking each.

        Args:
            num_classes: The number of classes that the labels must fit. Default: the source's own; where the
                source knows none either, a label must only be a non-negative integer.
            class_names: The classes in the order in which to number them, such as a model's. Where the source knows
                the names of its own, labels are renumbered by name.

        Returns:
            int64 array [len(self)].

        Raises:
            DataError: A label is missing, not an integer, out of range, or of a class that ``class_names`` lacks.
        """
        own = self.class_names
        if class_names is None:
            self.warn_of_order()
        if own is None or class_names is None:
            return self._checked(self.raw_labels, self.num_classes if num_classes is None else num_classes)
        labels = self._checked(self.raw_labels, len(own))
        place = {name: number for number, name in enumerate(class_names)}
        if unknown := [own[label] for label in np.unique(labels) if own[label] not in place]:
            raise DataError(
                f"{self.name} has images of classes that the model, or the training split, does not have: "
                f"{listed(unknown)}; it has {listed(class_names)}. Rename these classes, leave them out, or take the "
                "data that the model was trained for"
            )
        return self._checked([place[own[label]] for label in labels], num_classes)

    def warn_of_order(self) -> None:
        """Say that a model without names may number these classes otherwise: libraries sort names in two ways."""
        names = self.class_names or ()
        pairs = enumerate(zip(names, sorted(names), strict=True))
        first = next(((number, ours, theirs) for number, (ours, theirs) in pairs if ours != theirs), None)
        if self.sorts_names and first:
            logger.warning(
                "%s: the model does not name its classes. In timm's order, which counts here, class %d is '%s'; in "
                "that of torchvision's ImageFolder it is '%s'. If scores look like chance, name them in the order that "
                "the model was trained with, gohsp.models.set_class_names(model, names), and save it",
                self.name,
                *first,
            )

    def _class_order(self, first: set[str], own: set[str]) -> tuple[str, ...]:
        """The classes of the source's first split, and those that only this one has after them.

        Numbered alone, a split that lacks a class would shift the numbers of all that follow.
        """
        if first and (others := sorted(own - first)):
            logger.warning("%s has classes that the source's first split lacks: %s", self.name, listed(others))
        return (*sorted(first, key=folders.natural_key), *sorted(own - first, key=folders.natural_key))

    def _checked(self, labels: Sequence[Any], limit: int | None) -> np.ndarray:
        most = np.iinfo(np.int64).max if limit is None else limit
        for index, label in enumerate(labels):
            if not (isinstance(label, (int, np.integer)) and 0 <= label < most):
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
        return _WdsSplit(source, Path(os.path.expanduser(rest)), split)
    if source.image_key is not None or source.label_key is not None:
        raise DataError(
            f"image_key={source.image_key!r}, label_key={source.label_key!r}: only 'hfds/...' and 'wds/...' "
            f"sources have keys, '{source.source}' has none; leave both out"
        )
    if source.source == "digits":
        return _DigitsSplit(split)
    return _FolderSplit(Path(os.path.expanduser(source.source)), split)


class _FolderSplit(Split):
    """Class folders of image files."""

    sorts_names = True

    def __init__(self, root: Path, split: str) -> None:
        _require_folder(root)
        # By its real path, so that a link from one split to another does not hide that they are the same.
        folder = self._split_folder(root, split).resolve()
        self._root = folder
        found = folders.images_by_class(folder)
        samples = [(folders.natural_key(path), name) for name, paths in found.items() for path in paths]
        self._samples = [(path, name) for (_, path), name in sorted(samples)]
        if not self._samples:
            raise DataError(f"folder '{folder}' holds no images ({', '.join(folders.SUFFIXES)})")
        super().__init__(f"folder '{folder}'", len(self._samples))
        if empty := sorted(name for name, paths in found.items() if not paths):
            logger.warning("%s: no image (%s) in %s", self.name, ", ".join(folders.SUFFIXES), listed(empty))
        self._names = self._class_names(root, folder, {name for _, name in self._samples})

    def _class_names(self, root: Path, folder: Path, own: set[str]) -> tuple[str, ...] | None:
        if own == {""}:
            return None
        first = next((root / name for group in SYNONYMS for name in group if os.path.isdir(root / name)), folder)
        classes = folders.images_by_class(first.resolve()) if first.resolve() != folder else {}
        return self._class_order({name for name, paths in classes.items() if name and paths}, own)

    @staticmethod
    def _split_folder(root: Path, split: str) -> Path:
        if split in ("", "..") or Path(split).name != split:
            raise DataError(f"split '{split}': a split of a folder is the name of a sub-folder, such as 'train'")
        synonyms = next((group for group in SYNONYMS if split in group), ())
        for name in (split, *synonyms):
            if os.path.isdir(root / name):
                return root / name
            if os.path.exists(root / name):
                raise DataError(f"split '{split}': '{root / name}' is a file; a split is a folder of class folders")
        # Reading the whole folder here would mix the splits.
        if existing := [name for group in SYNONYMS for name in group if os.path.isdir(root / name)]:
            raise DataError(f"folder '{root}' has no split '{split}'; {nearest(split, existing)}")
        logger.warning("folder '%s' has no split folders: each split, '%s' too, is all of it", root, split)
        return root

    def open(self, index: int) -> Image.Image:
        return Image.open(self._samples[index][0])

    def filename(self, index: int) -> str:
        return folders.printable(self._relative(self._samples[index][0]))

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self._root}{os.sep}")

    def stored(self) -> Iterator[tuple[str, int]]:
        for path, _ in self._samples:
            yield self._relative(path), _size(path)

    @functools.cached_property
    def raw_labels(self) -> Sequence[Any]:
        if self._names is None:
            raise DataError(f"{self.name} has no class folders, hence no labels; put its images in such folders")
        number = {name: label for label, name in enumerate(self._names)}
        return [number[name] for _, name in self._samples]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self._names


def _is_text(given: Any) -> bool:
    """Whether ``given`` is a text that can be written down: a path may hold bytes that are no UTF-8."""
    return isinstance(given, str) and bool(given.strip()) and given.encode(errors="replace").decode() == given


def _require_folder(path: Path) -> None:
    if not os.path.isdir(path):
        problem = " is a file" if os.path.exists(path) else ": no such folder"
        raise DataError(f"source '{path}'{problem}; {_FORMS}")


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


class _HfdsSplit(Split):
    """A Hugging Face data set, from the hub or a local folder.

    timm's ``hfds`` reader fetches the label with every image; here the two columns are held apart, so that
    images without labels can be read.
    """

    def __init__(self, source: DataSource, name: str, split: str) -> None:
        require_packages(f"source '{source.source}'", "hf", "datasets")
        import datasets

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

    def stored(self) -> Iterator[tuple[str, int]]:
        from pyarrow import compute

        images = self._images.with_format("arrow")[:].column(self._image_key)
        part = {field.name: column for field, column in zip(images.type, images.flatten(), strict=True)}
        sizes = compute.call_function("binary_length", [part["bytes"]])
        for path, size in zip(part["path"].to_pylist(), sizes.to_pylist(), strict=True):
            yield str(path), _size(str(path)) if size is None else size

    @functools.cached_property
    def raw_labels(self) -> Sequence[Any]:
        key = self._label_column()
        labels = self._rows.select_columns([key])[:][key]
        if any(isinstance(label, str) for label in labels):
            raise DataError(
                f"{self.name}: column '{key}' holds text, not class labels; turn it into these with the data set's "
                f"class_encode_column('{key}')"
            )
        return labels

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

    def __str__(self) -> str:
        return folders.printable(f"{self.shard.name}:{self.key}")


class _WdsSplit(Split):
    """webdataset shards on a local disk, read by position.

    The tar headers are read once, which makes the samples countable and shufflable as a whole: every epoch
    sees each image once, with any number of workers, and labels are checked before any work.
    """

    sorts_names = True

    IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

    def __init__(self, source: DataSource, root: Path, split: str) -> None:
        _require_folder(root)
        self._shards = sorted(shard for shard in root.glob("*.tar") if not shard.name.startswith("."))
        if not self._shards:
            raise DataError(f"source '{source.source}': folder '{root}' holds no .tar files")
        self._chosen = self._shards_of(split)
        if not self._chosen:
            raise DataError(
                f"source '{source.source}' has no shards of split '{split}': a shard's name must contain it, as in "
                f"'{split}-0000.tar'; the folder holds '{self._shards[0].name}' to '{self._shards[-1].name}'"
            )
        self._source = source
        self._samples = self._samples_of(self._chosen)
        super().__init__(f"'{source.source}' split '{split}'", len(self._samples))

    def _shards_of(self, *splits: str) -> list[Path]:
        return [shard for shard in self._shards if not set(splits).isdisjoint(re.split(r"[-_.]", shard.stem))]

    def _samples_of(self, shards: Sequence[Path]) -> list[_TarImage]:
        extensions = (self._source.image_key,) if self._source.image_key else self.IMAGE_EXTENSIONS
        label_extension = "cls" if self._source.label_key is None else "json"
        return [sample for shard in shards for sample in _tar_images(shard, extensions, label_extension)]

    def open(self, index: int) -> Image.Image:
        sample = self._samples[index]
        return Image.open(io.BytesIO(_read(sample.shard, sample.image)))

    def filename(self, index: int) -> str:
        return str(self._samples[index])

    def stored(self) -> Iterator[tuple[str, int]]:
        for sample in self._samples:
            yield str(sample), sample.image[1]

    @functools.cached_property
    def raw_labels(self) -> Sequence[Any]:
        number = {name: label for label, name in enumerate(self.class_names or ())}
        return [number.get(label, label) if isinstance(label, str) else label for label in self._labels]

    @functools.cached_property
    def _labels(self) -> list[Any]:
        return _tar_labels(self._samples, self._source.label_key)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The words that stand for labels, if they are words."""
        if not any(isinstance(label, str) for label in self._labels):
            return None
        first = next((shards for group in SYNONYMS if (shards := self._shards_of(*group))), [])
        before = _tar_labels(self._samples_of(first), self._source.label_key) if first != self._chosen else self._labels
        words, own = ({label for label in labels if isinstance(label, str)} for labels in (before, self._labels))
        for label in (*before, *self._labels):
            if isinstance(label, int):
                raise DataError(
                    f"'{self._source.source}' has numbers and words for labels, such as {label} and '{min(own)}'; "
                    "use one kind in all shards"
                )
        return self._class_order(words, own)


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
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"shard '{shard}' cannot be read as an uncompressed tar file: {error}") from error
    for key, parts in files.items():
        image = next((parts[extension] for extension in image_extensions if extension in parts), None)
        if image is not None:
            yield _TarImage(shard, key, image, parts.get(label_extension))


def _tar_labels(samples: Iterable[_TarImage], key: str | None) -> list[Any]:
    """The label of every sample: a number or a word; None if there is none. ``key``: its field in a ``.json`` file."""
    labels = []
    for sample in samples:
        try:
            content = b"" if sample.label is None else _read(sample.shard, sample.label)
            labels.append(_label_of(content.decode().strip(), key))
        except (OSError, ValueError, RecursionError) as error:
            kind = "a word or a number" if key is None else f"a JSON object with the field '{key}'"
            raise DataError(f"the label of {sample} is not {kind}: {error}; mend the shard") from error
    return labels


def _label_of(text: str, key: str | None) -> Any:
    if not text:
        return None
    if key is None:
        is_number = re.fullmatch(r"[+-]?\d+(\.\d*)?", text)
        return text if not is_number else float(text) if "." in text else int(text)
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"it is {text[:40]!r}")
    return None if fields.get(key) == "" else fields.get(key)


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
        require_packages("source 'digits'", "cli", "sklearn")
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

    def stored(self) -> Iterator[tuple[str, int]]:
        return ((self.filename(index), 64) for index in range(len(self)))

    @property
    def raw_labels(self) -> Sequence[Any]:
        return self._labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return tuple("0123456789")
