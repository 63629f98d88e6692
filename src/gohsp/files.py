"""Files that are whole or not there, and files that can be told from damaged ones."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from gohsp.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_SEAL_BYTES = 16
SEAL = "[0-9a-f]" * (2 * _SEAL_BYTES)
"""The hash in the name of a sealed file, as a glob pattern."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Whatever keeps a file from being written while the context is open becomes one error that names it.

    Raises:
        StorageError: A system's error, or what safetensors and PyTorch make of it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StorageError(
            f"'{path}' cannot be written ({reason(error)}); make room, or name a place that can be written"
        ) from error


def reason(error: Exception) -> str:
    """What the system says of a failure, without the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` when the context ends well.

    Args:
        path: The file; its folder is made if missing.

    Raises:
        StorageError: It cannot be written; what stood there before is as it was.
    """
    with _temporary(path) as temporary:
        yield temporary
        _rename(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder, whose files take their places in ``folder`` when the context ends well.

    Args:
        folder: Where they go; made if missing.
        names: All that may be there. The last is removed before and put in place after all others, so that they are
            whole where it stands; what stood under a name that is not written this time goes.

    Raises:
        StorageError: They cannot be written.
    """
    with ExitStack() as stack:
        with storing(folder / names[0]):
            folder.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix=f".{names[0]}.", dir=folder)
            temporary = Path(stack.enter_context(made))
        yield temporary
        with storing(folder / names[0]):
            (folder / names[-1]).unlink(missing_ok=True)
            for name in names:
                if (temporary / name).exists():
                    _rename(temporary / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # or the name may survive a power cut, and the content not
    os.replace(temporary, path)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; what no text encodes, as in names of files, is escaped.

    Raises:
        StorageError: It cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all; tensors are moved to the CPU.

    Raises:
        StorageError: It cannot be written.
    """
    with replacing(path) as temporary:
        write_tensors(temporary, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as it comes; for use within :func:`storing` and what builds on it.

    What several names share in memory, as tied weights, is written under each of them.
    """
    from safetensors.torch import save_file  # which imports PyTorch

    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        plain[name] = tensor.clone() if tensor.data_ptr() in taken else tensor
        taken.add(tensor.data_ptr())
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors keeps its files from others
    save_file(plain, path)
    path.chmod(mode)


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors: values, shapes and types."""
    import torch  # which text files do without

    digest = hashlib.blake2b(digest_size=20)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        digest.update(flat.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that only gohsp reads back, by :func:`sealed`, in place of the one before it.

    Its name gets a hash of its content, so that a damaged one is known, and one rename is enough for both.

    Args:
        path: Its name without the hash: ``dense.pt`` for ``dense.HASH.pt``.
        write: Writes the content to the path that it is given.

    Raises:
        StorageError: It cannot be written.
    """
    before = _all_sealed(path)
    with _temporary(path) as temporary:
        write(temporary)
        whole = _named_by(temporary, path)
        _rename(temporary, whole)
        for file in before:
            if file != whole:
                file.unlink(missing_ok=True)


def sealed(path: Path) -> Path | None:
    """The whole file that :func:`seal` wrote for ``path``, or None; a damaged one is warned of and counts as none."""
    for file in _all_sealed(path):
        try:
            if _named_by(file, path) == file:
                return file
            logger.warning("'%s' is damaged; what it held is made anew", file)
        except OSError as error:
            logger.warning("'%s' cannot be read (%s); what it held is made anew", file, reason(error))
    return None


def _all_sealed(path: Path) -> list[Path]:
    """Sealed files of one name: two, where an end came between the new one and the removal of the old."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.{SEAL}{path.suffix}"))


def _named_by(content: Path, path: Path) -> Path:
    with content.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_SEAL_BYTES))
    return path.with_name(f"{path.stem}.{digest.hexdigest()}{path.suffix}")
