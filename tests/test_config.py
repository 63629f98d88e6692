"""Settings: every one there and back, and no misspelt or impossible one accepted."""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gohsp import config as configs
from gohsp.config import METHODS, MOVED, Config
from gohsp.errors import ConfigError

ROOT = Path(__file__).parents[1]

CHANGED: dict[str, Any] = {
    "method": "gohsp",
    "uniform": True,
    "seed": 7,
    "device": "cpu",
    "precision": "bf16",
    "model_arguments": {"img_size": 8, "global_pool": "avg"},
    "compare_dense": False,
    "calibration": {"images": 3, "mirror": False},
    "data": {"train_split": "train[:90%]", "image_key": "img", "strict": True},
    "ranking": {"method": "random", "damping": 0.25},
    "widths": {"stages": 2, "multiple": 4, "min_ffn": 0.5, "depth": False},
    "repair": {"guidance": 0.0, "ridge": 0.5},
    "latency": {"batch_size": 4},
    "dense": {"epochs": 2, "learning_rate": 0.125},
    "admm": {"penalty": "coupled", "metric": "norm", "warmup": 1.5},
    "finetune": {"epochs": 3},
    "training": {"batch_size": 5, "mixup": 0.5, "augment": "strong"},
}
TABLES = [key for key, value in CHANGED.items() if isinstance(value, dict) and key != "model_arguments"]


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("data", [{}, CHANGED], ids=["defaults", "changed"])
def test_toml_round_trip(tmp_path: Path, data: dict[str, Any]):
    config = configs.from_mapping(data)
    (tmp_path / "settings.toml").write_text(configs.to_toml(config), encoding="utf-8")
    assert configs.read(tmp_path / "settings.toml") == config


def test_given_values_are_taken_and_the_others_keep_their_defaults():
    config = configs.from_mapping(CHANGED)
    for key, value in CHANGED.items():
        present, default = getattr(config, key), getattr(Config(), key)
        if key not in TABLES:
            assert present == value
            continue
        for field in dataclasses.fields(present):
            assert getattr(present, field.name) == value.get(field.name, getattr(default, field.name))
    assert configs.from_mapping({}) == Config()


def test_every_setting_is_written_out_unless_it_is_none():
    def leaves(value: Any, prefix: str = "") -> set[str]:
        if not isinstance(value, dict) or prefix == "model_arguments.":
            return {prefix}
        return {leaf for k, v in value.items() if v is not None for leaf in leaves(v, f"{prefix}{k}.")}

    assert leaves(tomllib.loads(configs.to_toml(Config()))) == leaves(dataclasses.asdict(Config()))


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("sede", "seed"),
        ("finetunes", "finetune"),
        ("data.train_splits", "train_split"),
        ("ranking.dampning", "damping"),
        ("widths.multipel", "multiple"),
        ("dense.epoch", "epochs"),
        ("admm.rho_strat", "rho_start"),
        ("admm.metrics", "metric"),
        ("admm.warm_up", "warmup"),
        ("calibration.image", "images"),
        ("repair.rige", "ridge"),
        ("heal.epoch", "epochs"),
        ("latency.round", "rounds"),
        ("methods", "method"),
        ("finetune.learningrate", "learning_rate"),
        ("training.batchsize", "batch_size"),
    ],
)
def test_misspelt_keys_are_refused_with_the_nearest(path: str, near: str):
    with pytest.raises(ConfigError, match=rf"unknown key '{path}'; did you mean '{near}'\?"):
        configs.from_mapping(nested(path, 1))


def test_a_key_close_to_none_gets_the_whole_list():
    with pytest.raises(ConfigError, match=r"unknown key 'finetune\.xyz'; valid: 'epochs', 'learning_rate'"):
        configs.from_mapping({"finetune": {"xyz": 1}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", "one"),
        ("device", "tpu"),
        ("method", "two-shot"),
        ("precision", "fp8"),
        ("uniform", "yes"),
        ("model_arguments", [1]),
        ("data.strict", "perhaps"),
        ("data.train_split", 3),
        ("widths.multiple", 2.5),
        ("finetune.epochs", [1]),
        ("admm.penalty", "soft"),
        ("admm.metric", "l1"),
        ("training.batch_size", 1.5),
        ("training.augment", "hard"),
    ],
)
def test_wrong_types_and_choices_are_refused_naming_the_key(path: str, value: Any):
    with pytest.raises(ConfigError) as error:
        configs.from_mapping(nested(path, value), where="settings 'x.toml'")
    assert str(error.value).startswith(f"settings 'x.toml': {path} ")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_must_be_a_table(table: str):
    with pytest.raises(ConfigError, match=f"'?{table}'? must be a table, got 3"):
        configs.from_mapping({table: 3})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("calibration.images", 0),
        ("calibration.holdout", -1),
        ("ranking.damping", 1.5),
        ("widths.multiple", 0),
        ("widths.min_ffn", 1.5),
        ("dense.epochs", -1),
        ("admm.learning_rate", 0.0),
        ("finetune.learning_rate", float("nan")),
        ("finetune.warmup", -0.5),
        ("admm.rho_start", 0.0),
        ("admm.rho_end", 2.0),
        ("admm.interval", 0),
        ("training.batch_size", 0),
        ("training.label_smoothing", 1.5),
        ("training.distillation", -0.1),
        ("training.workers", -1),
        ("training.evaluate_every", 0),
    ],
)
def test_values_out_of_range_are_refused_naming_the_setting(path: str, value: float):
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]):
        configs.from_mapping(nested(path, value))


def leaves(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its key, and its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value, key = getattr(settings, field.name), f"{prefix}{field.name}"
        found |= leaves(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return found


NUMBERS = [key for key, value in leaves(Config()).items() if type(value) in (int, float)]
OPTIONAL = [key for key in ("widths.stages", "repair.ridge") if leaves(Config())[key] is None]
FLAGS = [key for key, value in leaves(Config()).items() if type(value) is bool]


@pytest.mark.parametrize("key", NUMBERS + OPTIONAL)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, -1e-9, True, "1", [1], 10**400, None])
def test_no_number_may_be_nonsense(key: str, value: Any):
    if value is None and key in OPTIONAL:
        assert configs.from_mapping(nested(key, value)) == Config()
    else:
        with pytest.raises(ConfigError, match=rf"(^|\W){key} must be a (whole|finite) number "):
            configs.from_mapping(nested(key, value))


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", ["no", 1, 0.0, None])
def test_a_flag_is_true_or_false(key: str, value: Any):
    with pytest.raises(ConfigError, match=rf"{key} must be true or false, got {value!r}"):
        configs.from_mapping(nested(key, value))


def test_settings_that_cannot_be_read_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml' does not exist"):
        configs.read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is no TOML"):
        configs.read(tmp_path)
    (tmp_path / "bad.toml").write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml' is no TOML"):
        configs.read(tmp_path / "bad.toml")
    (tmp_path / "typo.toml").write_text("[training]\nbatchsize = 3\n")
    with pytest.raises(ConfigError, match=r"typo\.toml': unknown key 'training\.batchsize'"):
        configs.read(tmp_path / "typo.toml")


def test_settings_that_come_with_the_project_read():
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        assert configs.read(path) != Config()
    demo = importlib.resources.files("gohsp").joinpath("demo.toml").read_text(encoding="utf-8")
    assert configs.from_mapping(tomllib.loads(demo)).dense.epochs > 0


# Keys of the first edition


@pytest.mark.parametrize("key", MOVED)
def test_a_key_of_the_first_edition_is_refused_with_what_took_its_place(key: str):
    with pytest.raises(ConfigError) as error:
        configs.from_mapping(nested(key, 1), where="settings 'old.toml'")
    text = str(error.value)
    assert text == f"settings 'old.toml': '{key}' was a key of gohsp 0.1; its place is taken by {MOVED[key]}"


def test_what_takes_a_keys_place_is_there():
    known = leaves(Config())
    places = {*known, *(key.partition(".")[0] for key in known)}
    for key, place in MOVED.items():
        assert key not in known
        assert place.partition(":")[0].partition(",")[0].partition(" ")[0] in {*places, "nothing"}


def test_a_file_of_the_first_edition_is_refused(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('route = "oneshot"\n[data]\ncalibration_images = 64\n')
    with pytest.raises(ConfigError, match=r"recipe\.toml': 'route' was a key of gohsp 0\.1; .* method: \"oneshot\""):
        configs.read(tmp_path / "recipe.toml")


# What does not go together


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "oneshot", "dense": {"epochs": 1}}, "trains no dense model"),
        ({"method": "finetune", "heal": {"epochs": 1}}, "fine-tunes instead; set it to 0"),
        ({"method": "gohsp", "admm": {"epochs": 0}}, r"needs admm\.epochs of 1 or more"),
        ({"data": {"resident": True}, "training": {"augment": "strong"}}, r'not "strong"'),
        ({"admm": {"rho_start": 0.5, "rho_end": 0.1}}, "rho_start must be at most"),
        ({"admm": {"rho_end": 2.0}}, "at most 1; got 2.0"),
        ({"uniform": True, "widths": {"depth": True}}, r"keeps every sub-layer, and widths\.depth lets whole ones go"),
        ({"data": {"train_split": " "}}, r"data\.train_split must name a split"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(data: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        configs.from_mapping(data)


def test_only_methods_that_train_train():
    assert [configs.from_mapping({"method": method}).trains for method in METHODS] == [False, True, True]
    assert Config().method == "oneshot"


def test_settings_are_plain_values_and_cannot_be_changed():
    config = Config()
    assert configs.from_mapping(configs.to_mapping(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert dataclasses.replace(config, seed=3).seed == 3
