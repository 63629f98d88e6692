"""Ways to spoil a model folder, by name; and which of the outcomes of loading it then may have."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SECRET = "the secret of the canary"

SAME, REFUSED, OTHER = "loaded the same", "refused", "loaded what it says"
Apply = Callable[[Path, Path, random.Random], None]


@dataclass(frozen=True)
class Mutation:
    """One way to spoil a folder.

    Attributes:
        apply: Spoils the folder; is given the canaries' folder and the source of chance, too.
        allows: What loading may come to.
        weight: How often it is drawn.
    """

    apply: Apply
    allows: tuple[str, ...] = (SAME, REFUSED)
    weight: int = 4


class Touch:
    """Its unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def plant_canaries(folder: Path) -> Path:
    """Write the files that no model folder may lead to; returns the mark that unpickling one of them leaves."""
    folder.mkdir()
    mark = folder / "mark"
    for name in ("canary.pth", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Touch(mark)))
    (folder / "canary.txt").write_text(SECRET)
    save_file({"canary": torch.zeros(1)}, folder / "canary.safetensors")
    (folder / CONFIG).write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 3}))
    return mark


# Values

DEEP = 100_000
RAW = {
    "<deep list>": "[" * DEEP + "]" * DEEP,
    "<deep table>": '{"a":' * DEEP + "1" + "}" * DEEP,
    "<unclosed>": "[" * DEEP,
    "<many digits>": "9" * 10_000,
    "<lone surrogate>": r'"\ud800"',
}
"""What stands in a config's text for a value that Python could not write."""

WILD: tuple[Any, ...] = (
    *RAW,
    *(None, "", "x", "x" * 5_000_000, "é\u0000\u202e😀", "../..", "/etc/passwd", "nan", "1e999", "{}", "__class__"),
    *(-1, -(2**63), 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf"), -float("inf")),
    *([], [[]], [None], [-1], [1, 2, 3, 4, 5, 6, 7], ["x"] * 100_000, {}, {"a": {"b": {}}}, {"": None}),
)
"""Never right where the writer puts a value that matters."""

PLAUSIBLE: tuple[Any, ...] = (0, 1, 2, 4, 8, 0.5, True, False, [8, 8], [0.5], "avg", "token", "bilinear")
HUGE: tuple[int, ...] = (10**5, 10**6, 10**9, 2**31, 2**62)
SIZES = ("depth", "embed_dim", "num_heads", "mlp_ratio", "img_size", "patch_size", "num_classes", "in_chans")
UNSAFE_NAMES = (
    *("hf-hub:x/y", "hf_hub:timm/vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224", "local-dir:/etc"),
    *("local-dir:{canaries}", "local-dir:.", "{canaries}", "{canaries}/canary.pth", "../..", "../canaries", "", " "),
    *("hf-hub:../../canaries", "https://example.org/x", "file:///etc/passwd", "os.system", "x" * 100_000, "\u0000"),
)
FOREIGN_NAMES = (
    *("resnet18", "swin_tiny_patch4_window7_224", "mixer_b16_224", "efficientnet_b0", "eva02_tiny_patch14_224"),
    *(
        "vit_base_patch16_224",
        "vit_giant_patch14_224",
        "beit_base_patch16_224",
        "test_vit",
        "vit_relpos_small_patch16_224",
    ),
)
UNSAFE_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    *(
        ("checkpoint_path", f"{{canaries}}/{name}")
        for name in ("canary.pth", "canary.txt", "canary.safetensors", "none")
    ),
    *(("checkpoint_path", path) for path in ("/etc/passwd", "hf-hub:x/y", "../canaries/canary.pth")),
    *(("pretrained", value) for value in (True, 1, "yes")),
    ("pretrained_cfg", "augreg_in21k"),
    ("pretrained_cfg", {"url": "https://example.org/x.pth"}),
    ("pretrained_cfg", {"file": "{canaries}/canary.pth"}),
    ("pretrained_cfg", {"hf_hub_id": "x/y", "architecture": "vit_tiny_patch16_224"}),
    ("pretrained_cfg_overlay", {"file": "{canaries}/canary.pth"}),
    ("pretrained_cfg_overlay", {"url": "file://{canaries}/canary.pth"}),
    *(("cache_dir", path) for path in ("{canaries}/cache", "/var/cache/x")),
    *(("features_only", True), ("out_indices", [0]), ("scriptable", True), ("exportable", True), ("no_jit", True)),
    *(("strict", False), ("block_fn", "os.system"), ("norm_layer", "os.system"), ("act_layer", "os.system")),
    *(("weight_init", "jax"), ("device", "cuda"), ("dtype", "int8"), ("model_name", "resnet18")),
)


# config.json


def config(change: Callable[[dict[str, Any], random.Random], Any]) -> Apply:
    """Changes what ``config.json`` says; the change may return what is to stand there instead."""

    def apply(folder: Path, canaries: Path, chance: random.Random) -> None:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        changed = change(content, chance)
        text = json.dumps(content if changed is None else changed).replace("{canaries}", str(canaries))
        for mark, raw in RAW.items():
            text = text.replace(json.dumps(mark), raw)
        (folder / CONFIG).write_text(text, encoding="utf-8")

    return apply


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) within a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _place(content: dict[str, Any], chance: random.Random) -> tuple[Any, Any]:
    """A place; half of the time one at the top or in the tables that say what the model is."""
    parts = [content, *(content[k] for k in ("arguments", "preprocessing", "widths") if content.get(k))]
    part = chance.choice(parts) if chance.random() < 0.5 else None
    return (part, chance.choice(_keys(part))) if part is not None else chance.choice(_places(content))


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def _set(values: tuple[Any, ...]) -> Callable[[dict[str, Any], random.Random], None]:
    def change(content: dict[str, Any], chance: random.Random) -> None:
        container, key = _place(content, chance)
        container[key] = chance.choice(values)

    return change


def _drop(content: dict[str, Any], chance: random.Random) -> None:
    container, key = _place(content, chance)
    del container[key]


def _table(content: dict[str, Any], chance: random.Random) -> dict[Any, Any]:
    """A table to put a key into."""
    return chance.choice([content, content["arguments"], content["preprocessing"], *content["widths"].values()])


def _rename(content: dict[str, Any], chance: random.Random) -> None:
    table = _table(content, chance)
    key = chance.choice(list(table))
    table[chance.choice([key.upper(), f"{key} ", f"_{key}", key[:-1], key.replace("_", "-") + "\u200b"])] = table.pop(
        key
    )


def _add(content: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice(["x", "", "名前", "__proto__", "drop_rate", "fused_attn", "auto_map", "trust_remote_code"])
    _table(content, chance)[name] = chance.choice(WILD)


def _list_for_table(content: dict[str, Any], chance: random.Random) -> Any:
    tables = [(c, k) for c, k in _places(content) if isinstance(c[k], dict)]
    if chance.random() < 0.2:
        return list(content.items())
    container, key = chance.choice(tables)
    container[key] = chance.choice([list(container[key]), [list(item) for item in container[key].items()]])
    return None


def _another_document(_: dict[str, Any], chance: random.Random) -> Any:
    return chance.choice(
        [*(value for value in WILD if value is not None), 0, True, [{}], {"format_version": 1}, {"format_version": 2}]
    )


def _name(names: tuple[str, ...]) -> Callable[[dict[str, Any], random.Random], None]:
    def change(content: dict[str, Any], chance: random.Random) -> None:
        content["architecture"] = chance.choice(names)

    return change


def _argument(content: dict[str, Any], chance: random.Random) -> None:
    key, value = chance.choice(UNSAFE_ARGUMENTS)
    content["arguments"][key] = value


def _huge(content: dict[str, Any], chance: random.Random) -> None:
    key, size = chance.choice(SIZES), chance.choice(HUGE)
    content["arguments"][key] = [size, size] if key.endswith("_size") else size


def _many_blocks(content: dict[str, Any], _: random.Random) -> None:
    content["arguments"]["depth"] = 100_000
    first = next(iter(content["widths"].values()))
    content["widths"] = {f"blocks.{block}.attn": first for block in range(100_000)}


def _preprocessing(content: dict[str, Any], chance: random.Random) -> None:
    if chance.random() < 0.3:
        content["preprocessing"] = chance.choice(WILD)
    else:
        table = content["preprocessing"]
        table[chance.choice([*table, "input_size", "test_input_size"])] = chance.choice(WILD)


def _format(content: dict[str, Any], chance: random.Random) -> None:
    key = chance.choice(["format_version", "library"])
    content[key] = chance.choice([*WILD, 0, 1, 2, 3, 10**6, 1.5, True, "1", "transformers", "TIMM"])


def _widths(content: dict[str, Any], chance: random.Random) -> None:
    widths = content["widths"]
    name, other = chance.choice(list(widths)), chance.choice(["blocks.9.attn", "layers.0", "", "head", "blocks.0"])
    table = widths[name]
    key = chance.choice(list(table))
    chance.choice(
        [
            lambda: table.update({key: table[key] + chance.choice([-1, 1, 8])}),
            lambda: table.update({key: chance.choice([0, *HUGE])}),
            lambda: table.update(dict.fromkeys(table, 0 if table[key] else 1)),
            lambda: widths.update({name: {"units": 8} if "heads" in table else {"heads": 1, "qk": 1, "vo": 1}}),
            lambda: widths.update({other: dict(table)}),
            lambda: widths.update({other: widths.pop(name)}),
            lambda: widths.pop(name),
            widths.clear,
        ]
    )()


def _first_edition(content: dict[str, Any], chance: random.Random) -> None:
    """Widths block by block, as format version 1 has them; spoilt, half of the time."""
    tables = list(content["widths"].values())
    blocks = [{**attention, "ffn": ffn["units"]} for attention, ffn in zip(tables[::2], tables[1::2], strict=True)]
    content |= {"format_version": 1, "widths": blocks, "kept": None}
    block = chance.choice(blocks)
    key = chance.choice(list(block))
    spoilt: list[Callable[[], Any]] = [
        lambda: block.update({key: chance.choice(WILD)}),
        lambda: block.pop(key),
        blocks.pop,
        lambda: content.update(widths=chance.choice(WILD)),
    ]
    if chance.random() < 0.5:
        chance.choice(spoilt)()


def _kept(content: dict[str, Any], chance: random.Random) -> None:
    kept = content.get("kept") or {"blocks.0.attn": {"heads": [0], "qk": [[0]], "vo": [[0]]}}
    container, key = chance.choice(_places(kept))
    container[key] = chance.choice(WILD)
    content["kept"] = kept


def _classes(content: dict[str, Any], chance: random.Random) -> None:
    key = next((k for k in content if "class" in k), "class_names")
    names = content.get(key) or [str(i) for i in range(10)]
    spoilt: list[Any] = [names[:-1], [*names, "one more"], names[:1] * len(names), [3, *names[1:]], [[], *names[1:]]]
    content[key] = chance.choice([*spoilt, *WILD])


def _text(change: Callable[[str, random.Random], str | bytes]) -> Apply:
    def apply(folder: Path, _: Path, chance: random.Random) -> None:
        text = change((folder / CONFIG).read_text(encoding="utf-8"), chance)
        (folder / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)

    return apply


def _twice(text: str, chance: random.Random) -> str:
    key = chance.choice(["architecture", "arguments", "widths", "preprocessing", "format_version"])
    return text.replace("{", f'{{"{key}": {chance.choice(["1", "null", "[]", chr(34) + "resnet18" + chr(34)])},', 1)


def _encoded(text: str, chance: random.Random) -> bytes:
    return chance.choice(
        [text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), b"\xff" + text.encode(), b"\x00" * 99]
    )


# model.safetensors


def tensors(change: Callable[[dict[str, torch.Tensor], str, random.Random], Any]) -> Apply:
    """Changes the tensors; the change is given the name of one of them, too."""

    def apply(folder: Path, _: Path, chance: random.Random) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(state, chance.choice(sorted(state)), chance)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)

    return apply


def _renamed(state: dict[str, torch.Tensor], name: str, chance: random.Random) -> None:
    new = chance.choice([f"module.{name}", name.upper(), f"{name}.", "", "x" * 100_000, f"{name}\u202e"])
    state[new] = state.pop(name)


def _added(state: dict[str, torch.Tensor], name: str, chance: random.Random) -> None:
    state[chance.choice(["x", f"{name}.lora_A", f"{name}_orig", "blocks.9.attn.qkv.weight"])] = state[name].clone()


def _reshaped(state: dict[str, torch.Tensor], name: str, chance: random.Random) -> None:
    given = state[name]
    shapes = [given.flatten(), given[None], given[:0], given.flatten()[0], given.repeat(2, *[1] * (given.ndim - 1))]
    same = [shape for shape in shapes if shape.shape != given.shape]
    state[name] = chance.choice([*same, given[..., :-1]]).clone()


ODD_TYPES = (torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
FLOATS = (torch.float16, torch.bfloat16, torch.float64)


def _odd_type(state: dict[str, torch.Tensor], name: str, chance: random.Random) -> None:
    kind = chance.choice(ODD_TYPES)
    for key in chance.choice([[name], list(state)]):
        state[key] = state[key].to(kind)


def _mixed(state: dict[str, torch.Tensor], name: str, chance: random.Random) -> None:
    state[name] = state[name].to(chance.choice(FLOATS))


def _all_other_float(state: dict[str, torch.Tensor], _: str, chance: random.Random) -> None:
    kind = chance.choice(FLOATS)
    state.update({key: tensor.to(kind) for key, tensor in state.items()})


def _not_finite(state: dict[str, torch.Tensor], name: str, chance: random.Random) -> None:
    tensor = state[name].view(-1)
    tensor[chance.randrange(len(tensor))] = chance.choice([float("nan"), float("inf"), -float("inf")])


def header(change: Callable[[dict[str, Any], str, random.Random], Any]) -> Apply:
    """Changes the header of the weights and leaves the data; the change may return other text for it."""

    def apply(folder: Path, _: Path, chance: random.Random) -> None:
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:end])
        text = change(table, chance.choice([name for name in sorted(table) if name != "__metadata__"]), chance)
        raw = (json.dumps(table) if text is None else text).encode()
        (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + content[end:])

    return apply


def _offsets(table: dict[str, Any], name: str, chance: random.Random) -> None:
    begin, end = table[name]["data_offsets"]
    other = table[chance.choice(sorted(table.keys() - {name, "__metadata__"}))]["data_offsets"]
    odd = [
        [end, begin],
        [-1, end],
        [begin, 2**63],
        [begin, 2**64 - 1],
        [begin + 4, end + 4],
        [begin],
        [],
        None,
        ["a", "b"],
    ]
    table[name]["data_offsets"] = chance.choice([other, *odd, [0, end], [begin, begin]])


def _declared(table: dict[str, Any], name: str, chance: random.Random) -> None:
    entry = table[name]
    kinds = ["F64", "F16", "I8", "BOOL", "C64", "F4", "", 3, None, "f32"]
    shapes = [[], [-1], [2**40], [2**32, 2**32], [2**64], [1] * 10_000, [0], None, "x", [1.5], [*entry["shape"], 2]]
    key, value = chance.choice([*(("dtype", k) for k in kinds), *(("shape", s) for s in shapes)])
    entry[key] = value


def _header_text(table: dict[str, Any], _: str, chance: random.Random) -> str:
    text = json.dumps(table)
    metadata = chance.choice(['{"a": 1}', "3", "{", '{"format": "pt"}', *RAW.values()])
    return chance.choice(
        [text[:-1], "[]", "", "{}", f"[{text}]", *RAW.values(), f'{{"__metadata__": {metadata},{text[1:]}']
    )


def _header_twice(table: dict[str, Any], name: str, _: random.Random) -> str:
    return f"{json.dumps(table)[:-1]}, {json.dumps(name)}: {json.dumps(table[name])}}}"


def _sparse(folder: Path, _: Path, chance: random.Random) -> None:
    """Gigabytes that lie on no disk, in a file that agrees with its header."""
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    size, extra = len(content) - end, chance.choice([1, 3, 20]) * 2**30
    table["x"] = {"dtype": "F32", "shape": [extra // 4], "data_offsets": [size, size + extra]}
    raw = json.dumps(table).encode()
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + content[end:])
    os.truncate(folder / WEIGHTS, 8 + len(raw) + size + extra)


# Bytes and files


def _either(chance: random.Random) -> str:
    return chance.choice([CONFIG, WEIGHTS])


def content(change: Callable[[bytes, random.Random], bytes], *, of: str | None = None) -> Apply:
    """Changes the bytes of one of the two files."""

    def apply(folder: Path, _: Path, chance: random.Random) -> None:
        path = folder / (of or _either(chance))
        path.write_bytes(change(path.read_bytes(), chance))

    return apply


def _flipped(start: Callable[[bytes], int], end: Callable[[bytes], int]) -> Callable[[bytes, random.Random], bytes]:
    def change(data: bytes, chance: random.Random) -> bytes:
        spoilt = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8])):
            spoilt[chance.randrange(start(data), end(data))] ^= 1 << chance.randrange(8)
        return bytes(spoilt)

    return change


def _data_start(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _length(data: bytes, chance: random.Random) -> bytes:
    length = chance.choice([0, 1, 2**32, 2**40, 2**63, 2**64 - 1, len(data), len(data) - 8, _data_start(data) - 9])
    return length.to_bytes(8, "little") + data[8:]


def _junk(data: bytes, chance: random.Random) -> bytes:
    junk, at = chance.randbytes(chance.choice([1, 7, 4096])), chance.choice([0, len(data), chance.randrange(len(data))])
    return data[:at] + junk + data[at:]


def replaced(by: Callable[[Path, Path, random.Random], None]) -> Apply:
    """Puts something else in the place of one of the two files."""

    def apply(folder: Path, canaries: Path, chance: random.Random) -> None:
        path = folder / _either(chance)
        path.rename(folder.parent / f"original-{path.name}")
        by(path, canaries, chance)

    return apply


def _linked(path: Path, canaries: Path, chance: random.Random) -> None:
    device = [Path("/dev/zero"), Path("/dev/full")]
    targets = [Path("/etc/passwd"), Path("/proc/self/environ"), path, Path("nowhere"), Path("/"), *device]
    path.symlink_to(chance.choice([*targets, *canaries.iterdir()]))


def _socket(path: Path, *_: Any) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def _another_file(path: Path, canaries: Path, chance: random.Random) -> None:
    shutil.copyfile(canaries / chance.choice(["canary.pth", "canary.txt", "canary.safetensors", CONFIG]), path)


def _more_files(folder: Path, canaries: Path, _: random.Random) -> None:
    for name in ("pytorch_model.bin", "canary.pth", "canary.txt"):
        shutil.copyfile(canaries / name, folder / name)
    (folder / "model.py").write_text("raise SystemExit")


ONLY_REFUSED, AS_WRITTEN = (REFUSED,), (SAME, REFUSED, OTHER)

MUTATIONS: dict[str, Mutation] = {
    "config: a key dropped": Mutation(config(_drop), weight=10),
    "config: a key renamed": Mutation(config(_rename), weight=8),
    "config: a key added": Mutation(config(_add), weight=8),
    "config: a wild value": Mutation(config(_set(WILD)), weight=40),
    "config: another plausible value": Mutation(config(_set(PLAUSIBLE)), AS_WRITTEN, weight=8),
    "config: a list for a table": Mutation(config(_list_for_table)),
    "config: another document": Mutation(config(_another_document), ONLY_REFUSED),
    "config: format and library": Mutation(config(_format)),
    "config: an unsafe architecture": Mutation(config(_name(UNSAFE_NAMES)), ONLY_REFUSED, weight=10),
    "config: a foreign architecture": Mutation(config(_name(FOREIGN_NAMES)), weight=4),
    "config: an unsafe argument": Mutation(config(_argument), ONLY_REFUSED, weight=14),
    "config: a huge size": Mutation(config(_huge), weight=4),
    "config: a hundred thousand blocks": Mutation(config(_many_blocks), ONLY_REFUSED, weight=1),
    "config: preprocessing": Mutation(config(_preprocessing), weight=10),
    "config: widths": Mutation(config(_widths), weight=10),
    "config: widths of the first edition": Mutation(config(_first_edition), weight=4),
    "config: kept units": Mutation(config(_kept)),
    "config: class names": Mutation(config(_classes)),
    "config: a key twice": Mutation(_text(_twice)),
    "config: another encoding": Mutation(_text(_encoded)),
    "tensors: one renamed": Mutation(tensors(_renamed), ONLY_REFUSED),
    "tensors: one dropped": Mutation(tensors(lambda state, name, _: state.pop(name)), ONLY_REFUSED),
    "tensors: one added": Mutation(tensors(_added), ONLY_REFUSED),
    "tensors: another shape": Mutation(tensors(_reshaped), ONLY_REFUSED, weight=6),
    "tensors: no floating-point numbers": Mutation(tensors(_odd_type), ONLY_REFUSED, weight=6),
    "tensors: mixed precision": Mutation(tensors(_mixed), ONLY_REFUSED),
    "tensors: all of another precision": Mutation(tensors(_all_other_float), AS_WRITTEN, weight=2),
    "tensors: NaN or infinite": Mutation(tensors(_not_finite), ONLY_REFUSED),
    "header: offsets": Mutation(header(_offsets), weight=6),
    "header: type or shape": Mutation(header(_declared), weight=6),
    "header: other text": Mutation(header(_header_text), weight=6),
    "header: a tensor twice": Mutation(header(_header_twice), weight=2),
    "header: its length": Mutation(content(_length, of=WEIGHTS)),
    "header: bits flipped": Mutation(content(_flipped(lambda _: 0, _data_start), of=WEIGHTS), AS_WRITTEN, weight=8),
    "weights: bits flipped": Mutation(content(_flipped(_data_start, len), of=WEIGHTS), AS_WRITTEN, weight=4),
    "weights: gigabytes": Mutation(_sparse, ONLY_REFUSED, weight=2),
    "config: bits flipped": Mutation(content(_flipped(lambda _: 0, len), of=CONFIG), AS_WRITTEN, weight=8),
    "file: truncated": Mutation(content(lambda data, chance: data[: chance.randrange(len(data))])),
    "file: junk put in": Mutation(content(_junk)),
    "file: missing": Mutation(replaced(lambda *_: None), ONLY_REFUSED),
    "file: a folder": Mutation(replaced(lambda path, *_: path.mkdir()), ONLY_REFUSED),
    "file: a link elsewhere": Mutation(replaced(_linked), ONLY_REFUSED, weight=6),
    "file: a link to itself, moved": Mutation(
        replaced(lambda path, *_: path.symlink_to(path.parent.parent / f"original-{path.name}")), weight=2
    ),
    "file: another file": Mutation(replaced(_another_file), ONLY_REFUSED),
    "file: a socket": Mutation(replaced(_socket), ONLY_REFUSED, weight=2),
    "file: a pipe": Mutation(replaced(lambda path, *_: os.mkfifo(path)), ONLY_REFUSED, weight=1),
    "folder: more files": Mutation(_more_files, (SAME,), weight=1),
}
"""Every way that there is."""


@dataclass(frozen=True)
class Case:
    """Case ``number``: which folder is spoilt and how. The same number always gives the same case."""

    number: int
    base: str
    name: str

    @property
    def allows(self) -> tuple[str, ...]:
        """What loading it may come to."""
        return MUTATIONS[self.name].allows

    def __str__(self) -> str:
        return f"case {self.number} of {self.base}"


def make_case(number: int, bases: Path, canaries: Path, folder: Path) -> Case:
    """Copy one of the folders in ``bases`` to ``folder`` and spoil it."""
    chance = random.Random(number)
    base = chance.choice(sorted(path.name for path in bases.iterdir()))
    name = chance.choices(list(MUTATIONS), [mutation.weight for mutation in MUTATIONS.values()])[0]
    shutil.copytree(bases / base, folder)
    MUTATIONS[name].apply(folder, canaries, chance)
    return Case(number, base, name)
