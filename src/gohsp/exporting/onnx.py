"""ONNX, by PyTorch's exporter, and run by ONNX Runtime, which also quantises it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gohsp.errors import CheckpointError, ExportError, UnsupportedModelError, one_line
from gohsp.exporting.traced import INPUT, OUTPUT

SUFFIX, BESIDE, NEEDS = ".onnx", (".onnx.data",), ("onnx", "onnxscript", "onnxruntime")
TYPES = (torch.float32, torch.float16)  # ONNX Runtime has no bfloat16 convolution on a CPU
FUSED = False  # its exporter takes attention apart
RUNTIME = "ONNX Runtime on the CPU"
INT8 = "onnxruntime.quantization.quantize_static: QDQ, weights in int8 by channel, their inputs in uint8 by tensor"

_PRODUCTS = ["MatMul", "Gemm", "Conv"]
_IMAGES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def converted(program: ExportedProgram) -> Any:
    """The program in ONNX's operators."""
    with _quiet():
        return torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hear no warnings of onnxscript, which warns of every operator that it leaves as it is."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def how(model: Any) -> str:
    """What made the file."""
    return f"torch.export, torch.onnx.export(dynamo=True), opset {model.model.opset_imports['']}"


def save(model: Any, path: Path) -> None:
    """Write the file; weights of more than ONNX's 2 GB go into one beside it."""
    model.save(path)


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The file, read and ready to run."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@dataclass(slots=True)
class _Reader:
    """Images as ONNX Runtime asks for them."""

    batches: Iterator[Tensor]

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def quantise(source: Path, path: Path, batches: Iterable[Tensor]) -> None:
    """Write a file again, its products with weights in int8.

    Products of activations with each other, which are attention's, stay in float32: 256 steps are few for what a
    softmax leaves to each of some hundred tokens. So do the results of all products.

    Args:
        source: The file in float32.
        path: The file in int8.
        batches: Images, on which the ranges of activations are found: the least and the greatest that occur.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_name(f"prepared{SUFFIX}")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    weights = {tensor.name for tensor in graph.initializer}
    attention = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
    quantization.quantize_static(
        prepared,
        path,
        _Reader(iter(batches)),
        op_types_to_quantize=_PRODUCTS,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_exclude=attention,
        extra_options={"OpTypesToExcludeOutputQuantization": _PRODUCTS},
    )


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """Any ONNX file, ready to be called on images.

    Attributes:
        path: Where it lies.
        session: What runs it.
        size: Channels, height and width of its images; None where they are open.
        dtype: Of its images.
    """

    path: Path
    session: Any
    size: tuple[int, int, int] | None
    dtype: torch.dtype

    def __call__(self, images: Tensor) -> list[Any]:
        """All of its outputs for images ``[B, C, H, W]``."""
        return self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})


def open_file(path: str | Path, threads: int) -> OnnxFile:
    """Open a file of anybody's on the CPU.

    Args:
        path: The file.
        threads: Threads that an operator may use. They wait without spinning once it is done, so that what runs next
            has the processor to itself.

    Raises:
        ExportError: ONNX Runtime is not installed.
        CheckpointError: There is no such file, or ONNX Runtime cannot read it.
        UnsupportedModelError: It takes something else than images.
    """
    path = Path(path)
    if importlib.util.find_spec("onnxruntime") is None:
        raise ExportError(f"'{path}' needs onnxruntime to run: pip install 'gohsp[onnx]'")
    if path.suffix != SUFFIX or not path.is_file():
        raise CheckpointError(f"'{path}' is no ONNX file; give the path of one, which ends in {SUFFIX}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has no class of errors for all that can be wrong
        raise CheckpointError(f"ONNX Runtime cannot open '{path}': {one_line(error)}") from error
    taken = session.get_inputs()
    if len(taken) != 1 or len(taken[0].shape) != 4 or taken[0].type not in _IMAGES:
        told = ", ".join(f"{port.type} {port.shape}" for port in taken)
        raise UnsupportedModelError(
            f"'{path}' takes {told}; a file that takes images [B, C, H, W] in float32 or float16 can be measured"
        )
    sides = taken[0].shape[1:]
    size = (sides[0], sides[1], sides[2]) if all(isinstance(side, int) for side in sides) else None
    return OnnxFile(path, session, size, _IMAGES[taken[0].type])
