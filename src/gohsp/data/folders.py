"""Class folders of image files: which folders are classes, and which images they hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from gohsp.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
"""How the names of images end, in either case."""

JUNK = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
"""Folders that archives, editors and file servers leave among a user's own; their names begin with no dot."""


def images_by_class(root: Path) -> dict[str, list[str]]:
    """Find the images below a folder. The class of an image is the name of the folder that it lies in.

    Files and folders whose names begin with a dot, and those of `JUNK`, are passed over.

    Args:
        root: The folder, without links in its path.

    Returns:
        The paths of the images by class; those of ``root`` itself by ``""``. A folder that holds neither images nor
        folders has an empty list.

    Raises:
        DataError: A folder cannot be read, is reached twice by a link, has a name that is no text, or holds images
            beside a folder that holds some, too.
    """
    images = _images_by_folder(str(root))
    classes: dict[str, list[str]] = {}
    for folder, files in images.items():
        above = next((str(up) for up in Path(folder).parents if files and images.get(str(up))), None)
        if above:
            raise DataError(
                f"folder '{above}' has images beside its class folders, such as '{os.path.relpath(folder, above)}'; "
                "the class of an image is the folder that it lies in: move them into one of these, or that folder away"
            )
        classes.setdefault("" if folder == str(root) else os.path.basename(folder), []).extend(files)
    return classes


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort ``class2`` before ``class10`` and without regard to case, as timm does; equal ones by their characters."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def printable(path: str) -> str:
    r"""Return a path as text: bytes that are no UTF-8 stand as ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _images_by_folder(root: str) -> Mapping[str, list[str]]:
    """The images of every folder that holds images, or nothing at all."""
    images: dict[str, list[str]] = {}
    reached: dict[str, str] = {}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in reached:
            raise DataError(
                f"folders '{reached[real]}' and '{folder}' are one and the same, by a link; remove the link, "
                "or its images would count twice"
            )
        reached[real] = folder
        inner, files = _listed(folder)
        waiting += inner
        if files or not inner:
            images[folder] = files
    return images


def _listed(folder: str) -> tuple[list[str], list[str]]:
    """The folders and the images directly in a folder."""
    inner, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in JUNK:
                    continue
                if entry.is_dir():
                    inner.append(entry.path)
                # A broken link counts as an unreadable image; a pipe, which would block its reader, as none.
                elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                    files.append(entry.path)
    except OSError as error:
        raise DataError(f"folder '{folder}' cannot be read: {error}; make it readable, or mend the link") from error
    for path in inner:
        if printable(path) != path:
            raise DataError(f"the name of folder '{printable(path)}' is no UTF-8 text; rename it")
    return inner, files
