from __future__ import annotations

import io
import json
import logging
import os
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from gohsp import data
from gohsp.data import (
    DataSource,
    Preprocessing,
    UnreadableImageError,
    calibration_images,
    eval_transform,
    loader,
    loading,
    open_split,
    sources,
    train_transform,
)
from gohsp.data.calibration import calibration_set
from gohsp.errors import DataError, MissingPackageError

ASSETS = Path(os.environ.get("GOHSP_ASSETS", Path(__file__).parents[1] / ".." / "shared"))

RGB = Preprocessing(
    image_size=16,
    channels=3,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
    crop_pct=0.9,
    interpolation="bicubic",
)
GREY = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.2,), crop_pct=1.0, interpolation="bilinear")


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def truncated_jpeg() -> bytes:
    content = encoded(picture(99, (64, 64)), "JPEG")
    return content[: len(content) // 2]


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    for start, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(100 * start + index).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", {"ant": 5, "bee": 4, "cat": 3})
    write_folder(tmp_path / "val", {"bee": 2, "cat": 2})
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes parquet splits as a local Hugging Face data set; returns its source."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    root = tmp_path / "hub"
    root.mkdir()

    def write(features: dict[str, object], **splits: dict[str, list]) -> DataSource:
        for name, columns in splits.items():
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            table.to_parquet(root / f"{name}-00000-of-00001.parquet")
        return DataSource(source=f"hfds/{root}")

    return write


def image_column(count: int) -> list[dict]:
    return [{"bytes": encoded(picture(index)), "path": f"p{index}.png"} for index in range(count)]


def batches(split: data.Split, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options = {"transform": train_transform(RGB), "batch_size": 4, "shuffle": True} | options
    return list(loader(split, **options))


def same(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


# Folders


def test_folder_finds_the_split_under_its_synonym(folder: Path):
    train = open_split(DataSource(source=str(folder)), "train")
    validation = open_split(DataSource(source=str(folder)), "validation")
    assert (len(train), len(validation)) == (12, 4)
    assert train.class_names == ("ant", "bee", "cat")
    image, label = train[6]
    assert np.array_equal(image, picture(101))
    assert label == 1


def test_folder_numbers_classes_alike_in_splits_that_lack_one(folder: Path):
    (folder / "train" / ".thumbnails").mkdir()
    (folder / "train" / "a-note.txt").touch()
    validation = open_split(DataSource(source=str(folder)), "validation")
    assert validation.labels().tolist() == [1, 1, 2, 2]
    assert validation.class_names == ("ant", "bee", "cat")


def test_folder_without_splits_is_read_whole_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_folder(tmp_path, {"c10": 1, "c2": 2})
    split = open_split(DataSource(source=str(tmp_path)), "validation")
    assert split.class_names == ("c2", "c10")
    assert split.labels().tolist() == [0, 0, 1]
    assert "no split folders" in caplog.text


def test_misspelt_split_of_a_folder_names_those_that_exist(folder: Path):
    with pytest.raises(DataError, match="no split 'tran'; did you mean 'train'"):
        open_split(DataSource(source=str(folder)), "tran")


def test_missing_and_empty_folders_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere.*no such folder"):
        open_split(DataSource(source=str(tmp_path / "nowhere")), "train")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train' holds no images"):
        open_split(DataSource(source=str(tmp_path)), "train")


def test_slices_and_keys_are_refused_where_they_would_be_ignored(folder: Path):
    with pytest.raises(DataError, match=r"train\[:90%\].*only 'hfds"):
        open_split(DataSource(source=str(folder)), "train[:90%]")
    with pytest.raises(DataError, match="label_key='fine'"):
        open_split(DataSource(source=str(folder), label_key="fine"), "train")


def test_images_outside_class_folders_are_no_class(folder: Path):
    picture(1).save(folder / "train" / "loose.png")
    with pytest.raises(DataError, match="beside its class folders"):
        open_split(DataSource(source=str(folder)), "train")
    flat = folder / "train" / "ant"
    assert len(calibration_images(DataSource(source=str(flat)), "train", 5, transform=eval_transform(RGB))) == 1
    with pytest.raises(DataError, match="no class folders"):
        open_split(DataSource(source=str(flat)), "train").labels()


# Hugging Face datasets


def test_hfds_finds_columns_and_slices(hub):
    from datasets import ClassLabel, Image, Value

    features = {"img": Image(), "id": Value("int64"), "fine_label": ClassLabel(names=["a", "b"])}
    columns = {"img": image_column(10), "id": list(range(10)), "fine_label": [0, 1] * 5}
    source = hub(features, train=columns)
    head, tail = open_split(source, "train[:80%]"), open_split(source, "train[80%:]")
    assert (len(head), len(tail)) == (8, 2)
    assert np.array_equal(tail.image(1), picture(9))
    assert tail.class_names == ("a", "b")
    assert tail.labels().tolist() == [0, 1]
    assert tail.filename(1) == "p9.png"


def test_hfds_names_the_columns_when_it_cannot_choose(hub):
    from datasets import ClassLabel, Image

    features = {"image": Image(), "fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["c"])}
    source = hub(features, train={"image": image_column(2), "fine": [0, 1], "coarse": [0, 0]})
    with pytest.raises(DataError, match=r"2 ClassLabel columns.*image_key.*label_key to one of.*'fine', 'coarse'"):
        open_split(source, "train").labels()
    chosen = DataSource(source=source.source, label_key="fine")
    assert open_split(chosen, "train").labels().tolist() == [0, 1]
    with pytest.raises(DataError, match=r"no column 'picture'.*image_key to one of 'image'"):
        open_split(DataSource(source=source.source, image_key="picture"), "train")


def test_hfds_names_the_splits_that_exist(hub):
    from datasets import Image

    source = hub({"image": Image()}, train={"image": image_column(2)}, test={"image": image_column(1)})
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        open_split(source, "trian[:50%]")
    with pytest.raises(DataError, match=r"no split 'validation'; valid: 'test', 'train'"):
        open_split(source, "validation")
    with pytest.raises(DataError, match=r"train\[:0%\]"):
        open_split(source, "train[:0%]")


def test_missing_hfds_folder_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere.*cannot be loaded"):
        open_split(DataSource(source=f"hfds/{tmp_path}/nowhere"), "train")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'gohsp\[hf\]'"):
        open_split(DataSource(source="hfds/some/set"), "train")


# webdataset shards


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_wds_reads_shards_by_position(tmp_path: Path):
    for shard in range(2):
        files = {f"a/orphan{shard}.cls": b"0"}  # no image, no sample
        for index in range(3):
            number = 3 * shard + index
            files[f"a/{number}.mask.png"] = b"another file of the sample, not a sample"
            files[f"a/{number}.png"] = encoded(picture(number))
            files[f"a/{number}.cls"] = str(number % 2).encode()
            files[f"a/{number}.json"] = json.dumps({"kind": number}).encode()
        write_shard(tmp_path / f"set-train-{shard:04}.tar", files)
    write_shard(tmp_path / "set-test-0000.tar", {"9.png": encoded(picture(9))})
    split = open_split(DataSource(source=f"wds/{tmp_path}"), "train")
    assert split.labels(2).tolist() == [0, 1, 0, 1, 0, 1]
    assert all(np.array_equal(split.image(index), picture(index)) for index in range(6))
    by_json = open_split(DataSource(source=f"wds/{tmp_path}", label_key="kind"), "train")
    assert by_json.labels().tolist() == list(range(6))
    with pytest.raises(DataError, match="label None"):
        open_split(DataSource(source=f"wds/{tmp_path}"), "test").labels(2)
    with pytest.raises(DataError, match=r"no shards of split 'tarin'.*set-test-0000.tar.*set-train-0001.tar"):
        open_split(DataSource(source=f"wds/{tmp_path}"), "tarin")


def test_damaged_shard_is_named(tmp_path: Path):
    (tmp_path / "train-0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match=r"train-0.tar' cannot be read"):
        open_split(DataSource(source=f"wds/{tmp_path}"), "train")


def write_words(root: Path, name: str, words: list[bytes], extension: str = "cls") -> None:
    files: dict[str, bytes] = {}
    for index, word in enumerate(words):
        files |= {f"{index}.png": encoded(picture(index)), f"{index}.{extension}": word}
    write_shard(root / f"{name}-0000.tar", files)


def test_wds_words_are_class_names_in_the_order_of_the_first_split(tmp_path: Path):
    write_words(tmp_path, "train", [b"cat", b"ant 10\n", b"ant 2"])
    write_words(tmp_path, "val", [b"cat", b"wasp", b"ant 10"])
    source = DataSource(source=f"wds/{tmp_path}")
    train, validation = open_split(source, "train"), open_split(source, "val")
    assert train.class_names == ("ant 2", "ant 10", "cat")
    assert train.labels().tolist() == [2, 1, 0]
    assert validation.class_names == ("ant 2", "ant 10", "cat", "wasp")
    assert validation.labels().tolist() == [2, 3, 1]
    assert validation.labels(5, ["wasp", "ant 10", "x", "ant 2", "cat"]).tolist() == [4, 0, 1]
    with pytest.raises(DataError, match="'wasp'"):
        validation.labels(3, train.class_names)


def test_wds_words_in_json_are_class_names(tmp_path: Path):
    write_words(tmp_path, "train", [b'{"kind": "cat"}', b'{"kind": "ant"}'], "json")
    split = open_split(DataSource(source=f"wds/{tmp_path}", label_key="kind"), "train")
    assert (split.class_names, split.labels().tolist()) == (("ant", "cat"), [1, 0])
    with pytest.raises(DataError, match=r"image 0 \(train-0000\.tar:0\).*label None"):
        open_split(DataSource(source=f"wds/{tmp_path}", label_key="none"), "train").labels(2)


@pytest.mark.parametrize(
    ("words", "extension", "message"),
    [
        ([b"cat", b"3"], "cls", "numbers and words for labels, such as 3 and 'cat'"),
        ([b"cat", b"  "], "cls", "label None"),
        ([b"cat", b"0.5"], "cls", "label 0.5"),
        ([b"1", b"0.5"], "cls", "label 0.5"),
        ([b"cat", b"\xff"], "cls", r"train-0000\.tar:1 is not a word or a number"),
        ([b'{"k": "cat"}', b"cat"], "json", r"train-0000\.tar:1 is not a JSON object with the field 'k'"),
        ([b'{"k": "cat"}', b'["cat"]'], "json", "is not a JSON object"),
        ([b'{"k": "cat"}', b'{"k": ["cat"]}'], "json", r"label \['cat'\]"),
        ([b'{"k": "cat"}', b'{"k": ""}'], "json", "label None"),
        ([b'{"k": "cat"}', b"[" * 100_000], "json", "is not a JSON object"),
        ([b"9" * 30], "cls", "label 9{30}, allowed"),
        ([b"9" * 5000], "cls", "is not a word or a number"),
    ],
)
def test_wds_labels_that_cannot_be_understood_are_refused(
    tmp_path: Path, words: list[bytes], extension: str, message: str
):
    write_words(tmp_path, "train", words, extension)
    source = DataSource(source=f"wds/{tmp_path}", label_key="k" if extension == "json" else None)
    with pytest.raises(DataError, match=message):
        open_split(source, "train").labels()


def test_hidden_shards_are_passed_over(tmp_path: Path):
    write_words(tmp_path, "train", [b"1", b"0"])
    (tmp_path / "._train-0000.tar").write_bytes(b"what a file server keeps beside it")
    assert open_split(DataSource(source=f"wds/{tmp_path}"), "train").labels().tolist() == [1, 0]


# Digits


def test_digits_splits_are_disjoint_and_stratified():
    splits = {name: open_split(DataSource(source="digits"), name) for name in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    names = [split.filename(index) for split in splits.values() for index in range(len(split))]
    assert len(set(names)) == 1797
    for split in splits.values():
        shares = np.bincount(split.labels(), minlength=10) / len(split)
        assert np.abs(shares - 0.1).max() < 0.02
        assert not split.mirrored_alike
    assert splits["train"].image(0).mode == "L"
    assert max(np.max(splits["train"].image(index)) for index in range(20)) == 255
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        open_split(DataSource(source="digits"), "tset")


# Labels


@pytest.mark.parametrize(("bad", "shown"), [(-1, "-1"), (3, "3"), (None, "None"), (0.5, "0.5"), ("cat", "'cat'")])
def test_labels_that_do_not_fit_are_named_before_any_work(folder: Path, bad: object, shown: str):
    split = open_split(DataSource(source=str(folder)), "train")
    split.raw_labels[7] = bad  # type: ignore[index]
    with pytest.raises(DataError, match=rf"image 7 \(bee.2\.png\).*label {shown}, allowed: 0 to 2 \(3 classes\)"):
        loader(split, transform=eval_transform(RGB), batch_size=4, shuffle=False)


def test_labels_are_checked_against_the_models_classes(folder: Path):
    split = open_split(DataSource(source=str(folder)), "train")
    with pytest.raises(DataError, match=r"image 9 .* label 2, allowed: 0 to 1 \(2 classes\)"):
        batches(split, num_classes=2)
    assert batches(split, num_classes=1000)[0][1].dtype == torch.int64


def test_unlabelled_hub_rows_are_refused(hub):
    from datasets import ClassLabel, Image

    features = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    source = hub(features, test={"image": image_column(2), "label": [0, -1]})
    with pytest.raises(DataError, match=r"image 1 \(p1.png\).*label -1"):
        batches(open_split(source, "test"))


def test_hub_labels_are_renumbered_by_name(hub):
    from datasets import ClassLabel, Image

    features = {"image": Image(), "label": ClassLabel(names=["a", "b", "c"])}
    split = open_split(hub(features, train={"image": image_column(3), "label": [0, 1, 0]}), "train")
    assert split.labels(4, ["b", "x", "a", "y"]).tolist() == [2, 0, 2]  # no image is of the class "c"
    with pytest.raises(DataError, match=r"not have: 'a', 'b'; it has 'x'"):
        split.labels(1, ["x"])


def test_hub_labels_of_text_are_refused(hub):
    from datasets import Image, Value

    features = {"image": Image(), "kind": Value("string")}
    source = hub(features, train={"image": image_column(2), "kind": ["a", "b"]})
    with pytest.raises(DataError, match=r"'kind' holds text.*class_encode_column"):
        open_split(DataSource(source=source.source, label_key="kind"), "train").labels(2)


# Digests


def test_the_digest_of_a_folder_is_of_names_and_sizes(folder: Path):
    def digest() -> str:
        return open_split(DataSource(source=str(folder)), "train").digest

    first, image = digest(), folder / "train" / "ant" / "0.png"
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    longer = digest()
    image.rename(image.with_name("9.png"))
    assert len({first, longer, digest()}) == 3
    image.with_name("9.png").rename(image)
    image.write_bytes(content)
    os.utime(image, (0, 0))
    assert digest() == first


def test_the_digest_of_a_hub_data_set_is_of_names_and_sizes(hub, monkeypatch: pytest.MonkeyPatch):
    from datasets import Image

    def split(images: list[dict], name: str = "train") -> data.Split:
        return open_split(hub({"image": Image()}, train={"image": images}), name)

    images = image_column(8)
    assert list(split(images).stored())[3] == ("p3.png", len(images[3]["bytes"]))
    other, renamed = image_column(8), image_column(8)
    other[3]["bytes"] = encoded(picture(3, (30, 30)))
    renamed[3]["path"] = "q3.png"
    digests = [split(given).digest for given in (images, other, renamed, images[:7])]
    assert len(set(digests)) == 4
    assert split(images, "train[:7]").digest == digests[-1]
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", None)
        assert split(images).digest == digests[0]


def test_the_digest_of_files_outside_a_hub_data_set_is_of_their_sizes(hub, tmp_path: Path):
    from datasets import Image

    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        picture(0).save(path)
    size = paths[0].stat().st_size
    features, columns = {"image": Image(decode=False)}, {"image": [*map(str, paths), None]}
    split = open_split(hub(features, train=columns), "train")
    paths[1].unlink()
    assert [stored for _, stored in split.stored()] == [size, -1, -1]


def test_the_digest_of_shards_is_of_members(tmp_path: Path):
    def digest(words: list[bytes]) -> str:
        write_words(tmp_path, "train", words)
        return open_split(DataSource(source=f"wds/{tmp_path}"), "train").digest

    assert digest([b"1", b"0"]) == digest([b"1", b"0"]) != digest([b"1", b"0", b"0"])
    assert (
        open_split(DataSource(source="digits"), "test").digest == open_split(DataSource(source="digits"), "test").digest
    )


# Unreadable images


@pytest.fixture
def damaged(folder: Path) -> Path:
    (folder / "train" / "bee" / "1.jpg").write_bytes(truncated_jpeg())
    return folder


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_dropped_and_counted_once(
    damaged: Path, cache: bool, workers: int, caplog: pytest.LogCaptureFixture
):
    split = open_split(DataSource(source=str(damaged)), "train")
    assert len(split) == 13
    assert split.unreadable == []
    options = {"transform": eval_transform(RGB), "batch_size": 5, "shuffle": True}
    batched = loader(split, **options, cache=cache, workers=workers)
    for _ in range(2):
        labels = torch.cat([label for _, label in batched])
        assert labels.bincount().tolist() == [5, 4, 3]
    assert [split.filename(index) for index in split.unreadable] == [os.path.join("bee", "1.jpg")]
    if workers == 0:  # a worker's log is its own
        assert caplog.text.count("1.jpg) of folder") == 1


def test_kept_images_stay_with_their_labels(damaged: Path):
    split = open_split(DataSource(source=str(damaged)), "train")
    transform = eval_transform(RGB)
    drawn = batches(split, transform=transform, batch_size=5)  # 4 would leave a batch of one image
    images, labels = torch.cat([image for image, _ in drawn]), torch.cat([label for _, label in drawn])
    found = []
    for index in set(range(13)) - set(split.unreadable):
        (place,) = (images == transform(split.image(index))).flatten(1).all(1).nonzero()
        assert labels[place].item() == split.raw_labels[index]
        found.append(place.item())
    assert sorted(found) == list(range(12))
    assert found != sorted(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_raises_naming_the_image(damaged: Path, workers: int):
    split = open_split(DataSource(source=str(damaged)), "train")
    with pytest.raises(DataError, match=r"bee.1\.jpg.*cannot be read"):
        batches(split, strict=True, workers=workers)


def test_batch_without_any_readable_image_raises(tmp_path: Path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "train" / "ant" / f"{name}.jpg").write_bytes(truncated_jpeg())
    split = open_split(DataSource(source=str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"all 2 images of a batch of folder.*image 0 \(ant.a\.jpg\)"):
        batches(split, batch_size=2, shuffle=False)
    with pytest.raises(DataError, match="none of the 2 images of folder"):
        calibration_images(DataSource(source=str(tmp_path)), "train", 1, transform=eval_transform(RGB))


def test_sixteen_bit_images_are_not_clipped_in_silence(tmp_path: Path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "train" / "ant" / "deep.png")
    split = open_split(DataSource(source=str(tmp_path)), "train")
    with pytest.raises(UnreadableImageError, match=r"deep\.png.*16"):
        split.image(0)


# Loader


def test_same_seed_same_batches_and_each_epoch_another(folder: Path):
    split = open_split(DataSource(source=str(folder)), "train")
    options = {"transform": train_transform(RGB, augment="strong"), "batch_size": 4, "shuffle": True}
    first, second, other = (loader(split, **options, seed=seed) for seed in (3, 3, 4))
    epochs = [list(first), list(first)]
    assert same(epochs[0], list(second))
    assert same(epochs[1], list(second))
    assert not same(*epochs)
    assert not same(epochs[0], list(other))
    resumed = loader(split, **options, seed=3)
    resumed.sampler.set_epoch(1)
    assert same(epochs[1], list(resumed))


def test_augmentation_differs_between_epochs_and_batches_without_shuffling(tmp_path: Path):
    write_folder(tmp_path / "train", {"ant": 1, "bee": 1})
    picture(0).save(tmp_path / "train" / "bee" / "0.png")  # the same image in two batches
    split = open_split(DataSource(source=str(tmp_path)), "train")
    repeated = loader(split, transform=train_transform(RGB), batch_size=1, shuffle=False)
    drawn = [image for _ in range(2) for image, _ in repeated]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_workers_do_not_change_a_pixel(folder: Path):
    split = open_split(DataSource(source=str(folder)), "train")
    strong = train_transform(RGB, augment="strong")
    alone, helped = (loader(split, transform=strong, batch_size=4, shuffle=True, workers=w) for w in (0, 2))
    for _ in range(2):
        assert same(list(alone), list(helped))


def test_loading_leaves_the_global_generators_alone(folder: Path):
    split = open_split(DataSource(source=str(folder)), "train")

    def draw() -> tuple:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    before = batches(split, transform=train_transform(RGB, augment="strong"))
    assert draw() == expected
    assert same(before, batches(split, transform=train_transform(RGB, augment="strong")))


@pytest.mark.parametrize("augment", ["none", "strong"])
def test_cache_changes_nothing(folder: Path, augment: data.Augment):
    Image.new("LA", (30, 30), (7, 9)).save(folder / "train" / "ant" / "alpha.png")
    Image.new("L", (30, 30), 80).save(folder / "train" / "ant" / "grey.jpg")
    options = {"transform": train_transform(RGB, augment=augment), "workers": 0}
    plain, cached = (
        batches(open_split(DataSource(source=str(folder)), "train"), **options, cache=cache) for cache in (False, True)
    )
    assert same(plain, cached)


def test_small_splits_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def decoded_in_two_epochs() -> int:
        split = open_split(DataSource(source=str(folder)), "train")
        count = 0
        decode = split._decode

        def counting(index: int):
            nonlocal count
            count += 1
            return decode(index)

        monkeypatch.setattr(split, "_decode", counting)
        batched = loader(split, transform=eval_transform(RGB), batch_size=4, shuffle=False)
        for _ in range(2):
            assert sum(len(labels) for _, labels in batched) == 12
        return count

    size = 12 * 24 * 20 * 3
    monkeypatch.setattr(loading, "CACHE_LIMIT", size)
    assert decoded_in_two_epochs() == 12
    monkeypatch.setattr(loading, "CACHE_LIMIT", size - 1)
    assert decoded_in_two_epochs() == 24


def test_drop_last_keeps_full_batches_only(folder: Path):
    split = open_split(DataSource(source=str(folder)), "train")
    assert [len(labels) for _, labels in batches(split, batch_size=5, drop_last=True)] == [5, 5]
    with pytest.raises(DataError, match="12 images, less than one batch of 13"):
        batches(split, batch_size=13, drop_last=True)


# Transforms


def test_preprocessing_of_deit_is_timms():
    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    preprocessing = Preprocessing.from_model(model)
    assert preprocessing == Preprocessing(
        image_size=224,
        channels=3,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=0.9,
        interpolation="bicubic",
    )
    transform = eval_transform(preprocessing)
    assert "size=248" in repr(transform)
    image = picture(0, (300, 260))
    reference = create_transform(**resolve_model_data_config(model), is_training=False)
    assert torch.equal(transform(image), reference(image))


def test_preprocessing_follows_the_model_as_built():
    model = timm.create_model("deit_tiny_patch16_224", depth=1, img_size=112, in_chans=1)
    preprocessing = Preprocessing.from_model(model)
    assert (preprocessing.image_size, preprocessing.channels) == (112, 1)
    assert preprocessing.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    tensor = eval_transform(preprocessing)(picture(0, (200, 150)))
    assert tensor.shape == (1, 112, 112)
    assert model.eval()(tensor[None]).shape == (1, 1000)
    wide = Preprocessing.from_model(timm.create_model("deit_tiny_patch16_224", depth=1, img_size=(32, 64)))
    assert eval_transform(wide)(picture(0)).shape == (3, 32, 64)


def test_crop_mode_is_honoured():
    half_dark = Image.fromarray(np.repeat(np.uint8([[0] * 40 + [255] * 40]), 20, axis=0))
    plain = {"image_size": 8, "channels": 1, "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0}
    marked = half_dark.copy()
    marked.paste(128, (0, 0, 10, 20))  # outside the centre crop, inside the squashed image
    for mode, seen in (("center", False), ("squash", True)):
        transform = eval_transform(Preprocessing(**plain, interpolation="bilinear", crop_mode=mode))
        assert torch.equal(transform(marked), transform(half_dark)) != seen


def test_preprocessing_needs_a_model_that_tells_it():
    with pytest.raises(DataError, match="Linear does not say what it does with an image"):
        Preprocessing.from_model(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, "channels=2"),
        ({"mean": (0.5,)}, "3 values"),
        ({"crop_pct": 1.5}, "crop_pct=1.5"),
        ({"interpolation": "bicubc"}, "did you mean 'bicubic'"),
        ({"crop_mode": "centre"}, "did you mean 'center'"),
    ],
)
def test_preprocessing_values_are_checked(change: dict, message: str):
    with pytest.raises(DataError, match=message):
        Preprocessing(**(vars(RGB) | change))


def test_augment_levels_differ_and_are_checked():
    image = picture(0)
    shown = {augment: repr(train_transform(RGB, augment=augment)) for augment in ("none", "light", "strong")}
    assert torch.equal(train_transform(RGB, augment="none")(image), eval_transform(RGB)(image))
    assert "scale=(0.35, 1.0)" in shown["light"]
    assert "RandAugment" not in shown["light"]
    assert "ColorJitter" not in shown["light"]
    assert "RandAugment" in shown["strong"]
    assert "RandomErasing" in shown["strong"]
    with pytest.raises(DataError, match="did you mean 'strong'"):
        train_transform(RGB, augment="stron")  # type: ignore[arg-type]


def test_mirroring_can_be_switched_off():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 24, dtype=np.uint8), (24, 1)))

    def rises(mirror: bool) -> set[bool]:
        transform = train_transform(GREY, mirror=mirror)
        return {bool(drawn[0, 0, -1] > drawn[0, 0, 0]) for drawn in (transform(ramp) for _ in range(40))}

    assert rises(mirror=False) == {True}
    assert rises(mirror=True) == {True, False}


@pytest.mark.parametrize("preprocessing", [RGB, GREY], ids=["rgb", "grey"])
def test_strong_augmentation_survives_every_operation(preprocessing: Preprocessing):
    transform = train_transform(preprocessing, augment="strong")
    image = picture(0, (10, 10))
    with loading._seeded(0):
        tensors = torch.stack([transform(image) for _ in range(3000)])
    assert tensors.isfinite().all()


# Calibration


def test_calibration_reads_no_labels(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: data.Split):
        raise AssertionError("a label was read")

    monkeypatch.setattr(sources._FolderSplit, "raw_labels", property(refuse))
    source, transform = DataSource(source=str(folder)), eval_transform(RGB)
    drawn, again, other = (
        calibration_images(source, "train", 7, transform=transform, seed=seed, batch_size=3) for seed in (1, 1, 2)
    )
    assert [len(batch) for batch in drawn] == [3, 3, 1]
    assert torch.equal(torch.cat(drawn), torch.cat(again))
    assert not torch.equal(torch.cat(drawn), torch.cat(other))
    assert len(torch.cat(drawn).unique(dim=0)) == 7


def test_calibration_needs_no_label_column(hub):
    from datasets import Image

    source = hub({"image": Image()}, train={"image": image_column(4)})
    (batch,) = calibration_images(source, "train", 4, transform=eval_transform(RGB))
    assert batch.shape == (4, 3, 16, 16)
    with pytest.raises(DataError, match="0 ClassLabel columns"):
        open_split(source, "train").labels()


def test_calibration_uses_what_there_is_and_warns(damaged: Path, caplog: pytest.LogCaptureFixture):
    source, transform = DataSource(source=str(damaged)), eval_transform(RGB)
    with caplog.at_level(logging.WARNING):
        exact = calibration_images(source, "train", 12, transform=transform)
    assert sum(map(len, exact)) == 12  # the unreadable image is replaced by a further draw
    assert "were asked for" not in caplog.text
    assert sum(map(len, calibration_images(source, "train", 13, transform=transform))) == 12
    assert "12 readable images, 13 were asked for" in caplog.text
    with pytest.raises(DataError, match="count=0"):
        calibration_images(source, "train", 0, transform=transform)


# Real data


@pytest.mark.assets
def test_real_parquet_sets_open_by_name_alone():
    if not (ASSETS / "data").is_dir():
        pytest.skip(f"no data sets at {ASSETS / 'data'}; set GOHSP_ASSETS")
    cifar = open_split(DataSource(source=f"hfds/{ASSETS}/data/cifar10"), "test[:100]")
    assert (len(cifar), cifar.num_classes, cifar.image(0).size) == (100, 10, (32, 32))
    dogs = open_split(DataSource(source=f"hfds/{ASSETS}/data/imagewoof-160"), "train[:90%]")
    assert len(dogs) == 4500
    assert set(dogs.labels()) == set(range(10))


@pytest.mark.parametrize(
    ("given", "calibrate", "held_out"),
    [(1, 1, 1), (30, 28, 2), (100, 95, 5), (110, 100, 10), (120, 100, 20), (500, 100, 20)],
)
def test_no_more_images_calibrate_than_asked_for(given: int, calibrate: int, held_out: int):
    images = torch.arange(float(given)).view(-1, 1, 1, 1).split(7)
    found = calibration_set(images, count=100, holdout=20, mirror=False)
    parts = [torch.cat([*part]).flatten().tolist() for part in (found.images, found.holdout)]
    assert [len(part) for part in parts] == [calibrate, held_out]
    assert parts[0] == list(range(calibrate))
    assert parts[1] == list(range(max(0, min(given, 120) - held_out), min(given, 120)))
