"""One pass and its gradients against plain autograd, image by image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gohsp.core import gradients
from gohsp.core.capture import behind
from gohsp.core.gradients import Gradients, differentiated, images_at_once
from gohsp.core.objective import Objective, classification, features
from gohsp.errors import NonFiniteError
from gohsp.models import describe, resize
from gohsp.structure import Network, absent

OBJECTIVES = {"classes": classification(), "features": features(scale=0.3)}


def one_pass(model: nn.Module, network: Network, objective: Objective, images: Tensor, **options: Any) -> Gradients:
    (found,) = differentiated(model, network, objective, [images], **options)
    return found


def by_probes(
    model: nn.Module, network: Network, images: Tensor, scalar: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Gradients of a scalar of the output by zeros added to what readouts write."""
    probes = {s.name: torch.zeros(len(images), s.tokens, s.readout.size, requires_grad=True) for s in network.present}
    hooks = [
        model.get_submodule(sub.readout.module).register_forward_hook(
            lambda _module, _args, written, probe=probes[sub.name]: written + probe
        )
        for sub in network.present
    ]
    output = model(images)
    for hook in hooks:
        hook.remove()
    return dict(zip(probes, torch.autograd.grad(scalar(output), list(probes.values())), strict=True))


def assert_same(got: Any, expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)
        assert not got[name].requires_grad


@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.5}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("of", OBJECTIVES)
def test_draws_and_confidence_are_differentiated_at_what_readouts_write(
    arguments: dict[str, Any], of: str, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    model, objective = make_model(mlp_ratio=1, **arguments), OBJECTIVES[of]
    network, images = describe(model), images[:6]
    dense = torch.randn(6, *objective.output(model(images)).shape[1:])
    found = one_pass(model, network, objective, images, draws=3, confidence=True, dense=[dense], seed=5)
    generator = torch.Generator().manual_seed(5)
    assert (found.images, len(found.drawn)) == (6, 3)
    torch.testing.assert_close(found.output, objective.output(model(images)))
    for drawn in found.drawn:
        assert_same(drawn, by_probes(model, network, images, lambda output: objective.draw(output, generator)))
    if objective.confidence is None:
        assert found.confidence is None
        return
    sureness = objective.confidence
    for expected, given in ((dense, [dense]), (found.output, None)):
        sure = one_pass(model, network, objective, images, draws=0, confidence=True, dense=given)
        assert_same(sure.confidence, by_probes(model, network, images, lambda out, of=expected: sureness(out, of)))


def test_a_pass_takes_fewer_images_of_a_larger_model(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    for block in model.blocks:  # type: ignore[union-attr]
        for sub in (block.attn, block.mlp):
            sub.register_forward_hook(lambda _module, _args, out: written.append(out.numel()))
    model(images[:1])
    network = describe(model)
    for room, expected in ((100 * sum(written), 32), (5 * sum(written), 5), (5 * sum(written) - 1, 4), (1, 1)):
        monkeypatch.setattr(gradients, "ROOM", room)
        assert images_at_once(network) == expected


@pytest.mark.parametrize("of", OBJECTIVES)
def test_an_images_gradient_is_its_own(of: str, model: nn.Module, network: Network, images: Tensor) -> None:
    """The scalars are sums over images, so that one backward pass of many images gives each one's gradient."""
    objective, images = OBJECTIVES[of], images[:4]
    found = one_pass(model, network, objective, images)
    dense = model(images).detach()
    for i in range(4):

        def alone(output: Tensor, i: int = i) -> Tensor:
            others = torch.cat([dense[:i], output, dense[i + 1 :]])
            return objective.draw(others, torch.Generator().manual_seed(0))

        expected = by_probes(model, network, images[i : i + 1], alone)
        assert_same({name: g[i : i + 1] for name, g in found.drawn[0].items()}, expected)


def test_what_is_read_makes_what_is_written(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    """Inputs and what readouts read, by the model's own modules."""
    model = make_model(mlp_ratio=1, init_values=0.5)
    network = describe(model)
    found = one_pass(model, network, classification(), images)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, args, out, name=name: seen.update({name: args[0], f"{name}>": out})
        )
    with torch.no_grad():
        model(images)
    assert set(found.inputs) == set(found.calls) == {"blocks.0.attn", "blocks.1.attn"}
    assert set(found.read) == set(network.widths)
    for sub in network.present:
        torch.testing.assert_close(found.read[sub.name], seen[sub.readout.module])
        gained = {"blocks.0.attn": "blocks.0.ls1>", "blocks.0.mlp": "blocks.0.ls2>"}.get(sub.name)
        if gained:
            nothing = torch.zeros_like(seen[gained])
            torch.testing.assert_close(behind(model, sub, nothing, found.read[sub.name]), seen[gained])
    for name, x in found.inputs.items():
        torch.testing.assert_close(x, seen[name])


def test_few_images_at_a_time_whatever_the_batches(
    model: nn.Module, network: Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = one_pass(model, network, features(), images)
    monkeypatch.setattr(gradients, "IMAGES", 5)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    parts = list(differentiated(model, network, features(), [images]))
    assert sizes == [part.images for part in parts] == [5] * 6 + [2]
    for name, gradient in whole.drawn[0].items():
        joined = torch.cat([part.drawn[0][name] for part in parts])
        torch.testing.assert_close(joined, gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.cat([part.read[name] for part in parts]), whole.read[name])


def test_without_draws_there_is_no_backward_pass(model: nn.Module, network: Network, images: Tensor) -> None:
    graphs: list[bool] = []
    model.register_forward_hook(lambda _module, _args, out: graphs.append(out.requires_grad))
    found = one_pass(model, network, classification(), images, draws=0)
    assert (found.drawn, found.confidence) == ((), None)
    assert found.read.keys() == network.widths.keys()
    sure = one_pass(model, network, classification(), images, draws=0, confidence=True)
    assert sure.drawn == ()
    assert sure.confidence is not None
    assert one_pass(model, network, features(), images, draws=0, confidence=True).confidence is None
    assert graphs == [False, True, True]


@pytest.mark.parametrize("frozen", ["all", "embedding and first block", "second attention"])
def test_frozen_parameters_change_nothing(frozen: str, model: Any, network: Network, images: Tensor) -> None:
    expected = one_pass(model, network, classification(), images, confidence=True)
    modules = {
        "all": [model],
        "embedding and first block": [model.patch_embed, model.blocks[0]],
        "second attention": [model.blocks[1].attn],
    }[frozen]
    for module in modules:
        module.requires_grad_(False)
    if frozen == "embedding and first block":
        model.pos_embed.requires_grad_(False)
        model.cls_token.requires_grad_(False)
    found = one_pass(model, network, classification(), images, confidence=True)
    assert_same(found.drawn[0], dict(expected.drawn[0]))
    assert_same(found.confidence, dict(expected.confidence or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_checkpointing_changes_nothing(trained: bool, model: Any, network: Network, images: Tensor) -> None:
    """It runs a block's forward again on the way back, once for every draw."""
    model.requires_grad_(trained)
    expected = one_pass(model, network, classification(), images, draws=2, confidence=True)
    model.set_grad_checkpointing(True)
    found = one_pass(model, network, classification(), images, draws=2, confidence=True)
    for mine, theirs in zip(found.drawn, expected.drawn, strict=True):
        assert_same(mine, dict(theirs))
        assert all(g.any() for g in mine.values())
    assert_same(found.confidence, dict(expected.confidence or {}))


def test_what_the_output_does_not_depend_on_has_gradient_0(model: Any, network: Network, images: Tensor) -> None:
    model.forward = lambda x: nn.Module.__call__(model.head, model.forward_features(x).mean(1).detach())
    found = one_pass(model, network, classification(), images)
    assert all(bool((g == 0).all()) for g in found.drawn[0].values())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_its_gradients_and_its_hooks_are_left_alone(
    training: bool, model: Any, network: Network, images: Tensor
) -> None:
    for block in model.blocks:
        block.mlp.drop1.p = 0.9
    expected = one_pass(model.eval(), network, classification(), images)
    model.train(training)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter) if i % 2 else None
        parameter.requires_grad_(i % 3 > 0)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():  # even where gradients are off
        found = one_pass(model, network, classification(), images)
    assert_same(found.drawn[0], dict(expected.drawn[0]))  # dropout was off
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all((p.grad is None) if i % 2 == 0 else bool((p.grad == 1).all()) for i, p in enumerate(model.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop", ["reading", "computing"])
def test_the_model_is_left_alone_when_a_pass_is_broken_off(
    stop: str, model: Any, network: Network, images: Tensor
) -> None:
    model.train()
    passes = differentiated(model, network, classification(), images.split(8))
    if stop == "computing":
        model.head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(passes)
    else:
        next(passes)  # and nobody asks for more
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_seed_decides_what_is_drawn(model: nn.Module, network: Network, images: Tensor) -> None:
    def first(seed: int) -> Tensor:
        return one_pass(model, network, classification(), images, seed=seed).drawn[0]["blocks.0.mlp"]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    drawn = one_pass(model, network, classification(), images, draws=2).drawn
    assert not torch.equal(drawn[0]["blocks.0.mlp"], drawn[1]["blocks.0.mlp"])


def test_a_lower_precision_differentiates_nearly_alike(model: nn.Module, network: Network, images: Tensor) -> None:
    exact = one_pass(model, network, features(), images)
    mixed = one_pass(model, network, features(), images, precision=torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")
    for name, gradient in exact.drawn[0].items():
        difference = mixed.drawn[0][name].float() - gradient
        assert 0 < float(difference.norm()) < 0.1 * float(gradient.norm())


@pytest.mark.parametrize("gone", ["blocks.0.attn", "blocks.1.mlp"])
def test_an_absent_sublayer_takes_no_part(gone: str, model: nn.Module, network: Network, images: Tensor) -> None:
    resize(model, {**network.widths, gone: absent(network.widths[gone])})
    found = one_pass(model, describe(model), classification(), images, confidence=True)
    left = set(network.widths) - {gone}
    assert set(found.read) == set(found.drawn[0]) == set(found.confidence or {}) == left
    assert set(found.inputs) == left - {"blocks.0.mlp", "blocks.1.mlp"}


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("blocks.0.norm1.weight", r"the input of module 'blocks\.0\.attn'"),
        ("blocks.0.attn.qkv.weight", r"the input of module 'blocks\.0\.attn\.proj'"),
        ("blocks.1.mlp.fc1.bias", r"the input of module 'blocks\.1\.mlp\.fc2'"),
        ("head.weight", "the model's output"),
    ],
)
@pytest.mark.parametrize("draws", [0, 1])
def test_the_first_place_of_what_is_not_finite_is_named(
    parameter: str, named: str, draws: int, model: nn.Module, network: Network, images: Tensor
) -> None:
    model.get_parameter(parameter).data.view(-1)[-1] = torch.nan
    with pytest.raises(NonFiniteError, match=named):
        one_pass(model, network, classification(), images, draws=draws)
