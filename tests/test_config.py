"""Recipes: every setting there and back, and no misspelt or impossible one accepted."""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gohsp import recipe as recipes
from gohsp.errors import ConfigError
from gohsp.recipe import Recipe

ROOT = Path(__file__).parents[1]

CHANGED: dict[str, Any] = {
    "seed": 7,
    "device": "cpu",
    "model_arguments": {"img_size": 8, "global_pool": "avg"},
    "allocation": "uniform",
    "data": {"train_split": "train[:90%]", "image_key": "img", "strict": True, "calibration_images": 3},
    "ranking": {"method": "random", "damping": 0.25},
    "widths": {"multiple": 4, "min_ffn": 0.5},
    "dense": {"epochs": 2, "learning_rate": 0.125},
    "admm": {"penalty": "coupled", "dual_step": 0.5, "projection": {"metric": "euclidean", "guidance": 0.0}},
    "admm_stage": {"warmup": 1.5},
    "finetune": {"schedule": "constant"},
    "training": {"batch_size": 5, "mixup": 0.5, "precision": "bf16", "augment": "strong"},
    "retrain_dense": False,
}
TABLES = [key for key, value in CHANGED.items() if isinstance(value, dict) and key != "model_arguments"]


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("data", [{}, CHANGED], ids=["defaults", "changed"])
def test_toml_round_trip(tmp_path: Path, data: dict[str, Any]):
    recipe = recipes.from_mapping(data)
    (tmp_path / "recipe.toml").write_text(recipes.to_toml(recipe), encoding="utf-8")
    assert recipes.read(tmp_path / "recipe.toml") == recipe


def test_given_values_are_taken_and_the_others_keep_their_defaults():
    recipe = recipes.from_mapping(CHANGED)
    for key, value in CHANGED.items():
        present, default = getattr(recipe, key), getattr(Recipe(), key)
        if key not in TABLES:
            assert present == value
            continue
        for field in dataclasses.fields(present):
            if field.name == "projection":
                assert (present.projection.metric, present.projection.guidance) == ("euclidean", 0.0)
                assert present.projection.ridge == default.projection.ridge
            else:
                assert getattr(present, field.name) == value.get(field.name, getattr(default, field.name))
    assert recipes.from_mapping({}) == Recipe()


def test_every_setting_is_written_out_unless_it_is_none():
    def leaves(value: Any, prefix: str = "") -> set[str]:
        if not isinstance(value, dict) or prefix == "model_arguments.":
            return {prefix}
        return {leaf for k, v in value.items() if v is not None for leaf in leaves(v, f"{prefix}{k}.")}

    assert leaves(tomllib.loads(recipes.to_toml(Recipe()))) == leaves(dataclasses.asdict(Recipe()))


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
        ("admm.projection.metrics", "metric"),
        ("admm_stage.warm_up", "warmup"),
        ("finetune.learningrate", "learning_rate"),
        ("training.batchsize", "batch_size"),
    ],
)
def test_misspelt_keys_are_refused_with_the_nearest(path: str, near: str):
    with pytest.raises(ConfigError, match=rf"unknown key '{path}'; did you mean '{near}'\?"):
        recipes.from_mapping(nested(path, 1))


def test_a_key_close_to_none_gets_the_whole_list():
    with pytest.raises(ConfigError, match=r"unknown key 'finetune\.xyz'; valid: 'epochs', 'learning_rate'"):
        recipes.from_mapping({"finetune": {"xyz": 1}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", "one"),
        ("device", "tpu"),
        ("allocation", "even"),
        ("model_arguments", [1]),
        ("data.strict", "perhaps"),
        ("data.train_split", 3),
        ("widths.multiple", 2.5),
        ("finetune.epochs", [1]),
        ("finetune.schedule", "cosin"),
        ("admm.penalty", "soft"),
        ("admm.projection.metric", "l1"),
        ("training.batch_size", 1.5),
        ("training.precision", "fp8"),
    ],
)
def test_wrong_types_and_choices_are_refused_naming_the_key(path: str, value: Any):
    with pytest.raises(ConfigError) as error:
        recipes.from_mapping(nested(path, value), where="recipe 'x.toml'")
    assert str(error.value).startswith(f"recipe 'x.toml': {path} ")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_must_be_a_table(table: str):
    with pytest.raises(ConfigError, match=f"'?{table}'? must be a table, got 3"):
        recipes.from_mapping({table: 3})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.calibration_images", 0),
        ("data.ranking_images", -1),
        ("ranking.damping", 1.5),
        ("widths.multiple", 0),
        ("widths.min_ffn", 1.5),
        ("dense.epochs", -1),
        ("admm_stage.learning_rate", 0.0),
        ("finetune.learning_rate", float("nan")),
        ("finetune.warmup", -0.5),
        ("admm.rho_start", 0.0),
        ("admm.rho_end", 2.0),
        ("admm.interval", 0),
        ("admm.tolerance", 0.0),
        ("admm.freeze", 1.5),
        ("training.batch_size", 0),
        ("training.label_smoothing", 1.5),
        ("training.distillation", -0.1),
        ("training.ema", 1.5),
        ("training.temperature", 0.0),
        ("training.workers", -1),
        ("training.evaluate_every", 0),
    ],
)
def test_values_out_of_range_are_refused_naming_the_setting(path: str, value: float):
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]):
        recipes.from_mapping(nested(path, value))


def leaves(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its key, and its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value, key = getattr(settings, field.name), f"{prefix}{field.name}"
        found |= leaves(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return found


NUMBERS = [key for key, value in leaves(Recipe()).items() if type(value) in (int, float)]
OPTIONAL = ["allocation_stages", "admm.dual_step"]
FLAGS = [key for key, value in leaves(Recipe()).items() if type(value) is bool]


@pytest.mark.parametrize("key", NUMBERS + OPTIONAL)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, -1e-9, True, "1", [1], 10**400, None])
def test_no_number_may_be_nonsense(key: str, value: Any):
    if value is None and key in OPTIONAL:
        assert recipes.from_mapping(nested(key, value)) == Recipe()
    else:
        with pytest.raises(ConfigError, match=rf"(^|\W){key} must be a (whole|finite) number "):
            recipes.from_mapping(nested(key, value))


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", ["no", 1, 0.0, None])
def test_a_flag_is_true_or_false(key: str, value: Any):
    with pytest.raises(ConfigError, match=rf"{key} must be true or false, got {value!r}"):
        recipes.from_mapping(nested(key, value))


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"training\.optimizer 'adamww' is unknown; did you mean 'adamw'"):
        recipes.from_mapping({"training": {"optimizer": "adamww"}})


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml' does not exist"):
        recipes.read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is no TOML"):
        recipes.read(tmp_path)
    (tmp_path / "bad.toml").write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml' is no TOML"):
        recipes.read(tmp_path / "bad.toml")
    (tmp_path / "typo.toml").write_text("[training]\nbatchsize = 3\n")
    with pytest.raises(ConfigError, match=r"typo\.toml': unknown key 'training\.batchsize'"):
        recipes.read(tmp_path / "typo.toml")


def test_recipes_that_come_with_the_project_read():
    found = sorted((ROOT / "recipes").glob("*.toml"))
    assert found
    for path in found:
        assert recipes.read(path) != Recipe()
    demo = importlib.resources.files("gohsp").joinpath("demo.toml").read_text(encoding="utf-8")
    assert recipes.from_mapping(tomllib.loads(demo)).dense.epochs > 0
