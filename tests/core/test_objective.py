from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core.objective import (
    Objective,
    classification,
    features,
    mean_distance,
    outputs,
    resolve_objective,
    tensor_in,
)
from gohsp.errors import NonFiniteError, UnsupportedModelError

SHAPES = {"classification": (6,), "features": (3, 4)}
SCALE = 0.37


def made(name: str) -> Objective:
    return classification() if name == "classification" else features(scale=SCALE)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_classes_are_apart_by_the_divergence_of_kullback_and_leibler(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(sum(sizes), 6, generator=generator) for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(classification().distance(a, b), expected, rtol=1e-4, atol=1e-6)
    got = mean_distance(classification(), a.split(sizes), b.split(sizes))  # a mean over images, not over batches
    assert got == pytest.approx(float(expected.mean()), rel=1e-4)
    assert got > 0
    assert mean_distance(classification(), a.split(sizes), a.split(sizes)) == 0


def test_features_are_apart_by_half_the_mean_squared_error_over_their_variance() -> None:
    a, b = noise(5, 3, 4), noise(5, 3, 4, seed=1)
    expected = (a - b).square().mean((1, 2)) / (2 * SCALE)
    torch.testing.assert_close(features(scale=SCALE).distance(a, b), expected)
    assert mean_distance(features(scale=SCALE), [a[:4], a[4:]], [b[:4], b[4:]]) == pytest.approx(float(expected.mean()))
    assert mean_distance(features(), [a], [a]) == 0
    constant = a.mean(0, keepdim=True).expand_as(a)  # a constant output is half a unit away
    scale = float(a.var(dim=0, correction=0).mean())
    assert mean_distance(features(scale=scale), [a], [constant]) == pytest.approx(0.5)


def hessian(objective: Objective, output: Tensor) -> Tensor:
    """Second derivatives of one image's distance by its output, at the dense output ``[n, n]``."""
    flat = output.flatten()
    return torch.autograd.functional.hessian(
        lambda other: objective.distance(output, other.view_as(output))[0], flat, vectorize=True
    )


def second_moment(objective: Objective, output: Tensor, draws: int) -> Tensor:
    """Mean outer product of the gradients of draws, of many copies of one image at a time ``[n, n]``."""
    many = output.expand(draws, *output.shape[1:]).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.draw(many, torch.Generator().manual_seed(0)), many)
    rows = gradient.flatten(1).double()
    return rows.T @ rows / draws


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_draws_have_the_distances_curvature_as_their_second_moment(name: str, seed: int) -> None:
    objective, output = made(name), noise(1, *SHAPES[name], seed=seed)
    curvature = hessian(objective, output).double()
    torch.testing.assert_close(second_moment(objective, output, 200_000), curvature, rtol=0, atol=0.01 / SCALE / 2)


def test_over_all_classes_that_is_exact() -> None:
    """``diag(p) - p p^T``: the mean over classes, each as likely as predicted, in place of draws."""
    logits = noise(1, 6)
    p = logits.softmax(-1)[0]
    rows = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda z, c=c: F.cross_entropy(z, torch.tensor([c])), logits)[0]
            for c in range(6)
        ]
    )
    torch.testing.assert_close((rows.T * p) @ rows, hessian(classification(), logits))


@pytest.mark.parametrize("name", SHAPES)
def test_half_the_mean_square_of_a_draws_change_is_the_distance_of_a_small_change(name: str) -> None:
    objective, output = made(name), noise(4, *SHAPES[name])
    step = 0.02 * noise(4, *SHAPES[name], seed=1)
    many = output.repeat(20_000, *[1] * (output.ndim - 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective.draw(many, torch.Generator().manual_seed(0)), many)
    change = (gradient.view(-1, *output.shape) * step).flatten(2).sum(2).double()
    squares = change.square().mean(0) / 2
    torch.testing.assert_close(squares, objective.distance(output, output + step).double(), rtol=0.06, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_draws_are_those_of_their_generator(name: str) -> None:
    objective, output = made(name), noise(8, *SHAPES[name])

    def draws(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [objective.draw(output, generator) for _ in range(2)]

    state = torch.get_rng_state()
    first, again, other = draws(0), draws(0), draws(1)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_confidence_is_the_log_probability_of_the_classes_that_the_dense_model_predicts() -> None:
    logits, dense = noise(5, 6), noise(5, 6)
    confidence = classification().confidence
    assert confidence is not None
    p = logits.softmax(-1)
    torch.testing.assert_close(confidence(logits, dense), p[range(5), dense.argmax(-1)].log().sum())
    assert features().confidence is None


class Output(NamedTuple):
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    last_hidden_state: Tensor | None = None


class Fields(dict):
    """As transformers' outputs: a dict whose entries are attributes, too."""

    __getattr__ = dict.get


A, B = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (A, A),
        ({"logits": A, "aux": B}, A),
        ({"pooler_output": A, "last_hidden_state": B}, A),
        ({"image_embeds": A, "text_embeds": B}, A),
        ({"last_hidden_state": A}, A),
        (Fields(logits=A, hidden_states=(B,)), A),
        (Output(logits=A, pooler_output=B), A),
        (Output(pooler_output=A, last_hidden_state=B), A),
        ((A, B), A),
        ([A, B], A),
    ],
)
def test_the_tensor_in_what_models_return(returned: Any, expected: Tensor) -> None:
    assert tensor_in(returned) is expected


@pytest.mark.parametrize("returned", [None, {}, {"out": A}, (), [None, A], "logits", {"logits": None}])
def test_where_no_tensor_is_found_the_remedy_is_named(returned: Any) -> None:
    what = type(returned).__name__
    with pytest.raises(
        UnsupportedModelError, match=rf"returns a {what}, in which no tensor is found; give an objective"
    ):
        tensor_in(returned)


class Wrapped(nn.Module):
    """A user's module around a backbone, which returns what ``shape`` makes of its output."""

    def __init__(self, backbone: nn.Module, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.backbone, self.shape = backbone, shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.backbone(x))


class Headed(nn.Module):
    """A backbone with a head of its own, and perhaps a configuration that tells how many classes there are."""

    def __init__(self, backbone: nn.Module, classes: int, *, config: Any = None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(32, classes)
        if config is not None:
            self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Config(NamedTuple):
    num_labels: int


LOGITS_IN: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda z: z,
    "a dict": lambda z: {"logits": z, "loss": None},
    "a tuple": lambda z: (z, z.sum()),
    "a named tuple": lambda z: Output(logits=z),
    "attributes": lambda z: Fields(logits=z),
}


@pytest.mark.parametrize("shape", LOGITS_IN)
def test_a_classifier_is_told_even_inside_a_wrapper(shape: str, model: nn.Module, images: Tensor) -> None:
    wrapped = Wrapped(model, LOGITS_IN[shape])
    objective = resolve_objective(None, wrapped, images)
    assert objective.name == "classification"
    assert torch.equal(objective.output(wrapped(images)), model(images))
    assert resolve_objective(None, model, images).name == "classification"


def test_a_backbone_returns_features(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    backbone = make_model(num_classes=0)
    objective = resolve_objective(None, backbone, images)
    assert objective.name == "features"
    with torch.no_grad():
        output = backbone(images)
    constant = output.mean(0, keepdim=True).expand_as(output)
    assert mean_distance(objective, [output], [constant]) == pytest.approx(0.5)  # measured on these images


def test_a_head_of_its_own_says_by_its_configuration_that_it_tells_classes_apart(
    make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    backbone = make_model(num_classes=0)
    assert resolve_objective(None, Headed(backbone, 7, config=Config(7)), images).name == "classification"
    assert resolve_objective(None, Headed(backbone, 7, config=Config(9)), images).name == "features"
    assert resolve_objective(None, Headed(backbone, 7), images).name == "features"  # an embedding looks like this


def test_what_is_made_of_logits_is_not_taken_for_logits(model: nn.Module, images: Tensor) -> None:
    probabilities = Wrapped(model, lambda z: z.softmax(-1))
    assert resolve_objective(None, probabilities, images).name == "features"
    assert resolve_objective("classification", probabilities, images).name == "classification"


@pytest.mark.parametrize("arguments", [{"num_classes": 1}, {"num_classes": 0, "global_pool": ""}], ids=str)
def test_one_logit_and_tokens_are_features(
    arguments: dict[str, Any], make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    model = make_model(mlp_ratio=1, **arguments)
    assert resolve_objective(None, model, images).name == "features"
    with pytest.raises(UnsupportedModelError, match=r"classification needs logits \[images, classes\] of two classes"):
        resolve_objective("classification", model, images)


def test_what_is_given_is_taken(model: nn.Module, images: Tensor) -> None:
    given = features(scale=3.0)
    assert resolve_objective(given, model, images) is given
    assert resolve_objective("classification", model, images).name == "classification"
    assert resolve_objective("features", model, images).name == "features"
    tokens = resolve_objective(lambda returned: returned[:, :2], model, images)
    assert (tokens.name, tokens.output(model(images)).shape) == ("features", (32, 2))


@pytest.mark.parametrize(
    "given", ["features", "classification", lambda returned: returned[:, 0]], ids=["features", "classes", "function"]
)
def test_an_output_that_is_the_same_for_all_images_is_told(
    given: Any, model: Any, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_objective(given, model, images)
    assert not caplog.messages
    resolve_objective(given, model, images[:1])  # one image is no sign
    assert not caplog.messages
    resolve_objective(given, model, torch.zeros_like(images))
    (message,) = caplog.messages
    assert message.startswith("the model's output is the same for each of 32 images")


def test_a_constant_output_still_has_an_objective(model: Any, images: Tensor) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    objective = resolve_objective("features", model, images)
    output = model(images).detach()
    assert mean_distance(objective, [output], [output]) == 0
    assert bool(torch.isfinite(objective.draw(output, torch.Generator())))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("clasification", r"objective 'clasification' is unknown; give 'classification', 'features', or a function"),
        (lambda returned: None, "the objective's function returns a NoneType, not a tensor"),
        (lambda returned: returned.sum(), r"the output that counts is \[\] of torch.float32 for 32 images"),
        (lambda returned: returned[:3], r"the output that counts is \[3, 5\] of torch.float32 for 32 images"),
        (lambda returned: returned.argmax(-1), r"torch\.int64 for 32 images; it must be floating-point"),
        (lambda returned: returned / 0, "the model's output holds NaN"),
    ],
)
def test_objectives_that_cannot_be(given: Any, message: str, model: nn.Module, images: Tensor) -> None:
    with pytest.raises((UnsupportedModelError, NonFiniteError), match=message):
        resolve_objective(given, model, images)
    assert not any(module._forward_hooks for module in model.modules())


def test_resolving_leaves_the_model_alone(model: nn.Module, images: Tensor) -> None:
    model.train()
    resolve_objective(None, model, images)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_evaluation(model: Any, images: Tensor, precision: torch.dtype) -> None:
    with torch.no_grad():
        expected = model(images)
    model.train()
    for block in model.blocks:
        block.mlp.drop1.p = 0.9
    batches: Iterable[Tensor] = iter(images.split(20))
    found = outputs(model, classification(), batches, precision)
    assert [len(of) for of in found] == [20, 12]
    assert all(of.dtype == torch.float32 and not of.requires_grad for of in found)
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.1, "atol": 0.2}
    torch.testing.assert_close(torch.cat(found), expected, **close)
    assert model.training
    model.head.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="the model's output holds NaN"):
        outputs(model, classification(), [images])
