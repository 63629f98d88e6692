"""One contract for the families of ``zoo``: what any model that enters must allow, from description to reload."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from timm.models import vision_transformer_sam as sam
from torch import Tensor, nn
from zoo import ZOO, images_for, made

import gohsp
from gohsp import AdmmSettings, Config, admm
from gohsp.config import from_mapping
from gohsp.core.capture import Call, attention_rows, behind, in_stream, open_trunk, rows_of, rows_of_input, taken
from gohsp.core.objective import tensor_in
from gohsp.errors import CheckpointError, UnsupportedModelError
from gohsp.evaluation import evaluate
from gohsp.models import (
    EQUALITY_TOLERANCE,
    check_specification,
    compact,
    describe,
    families,
    relative_difference,
    resized,
    working_copy,
)
from gohsp.models.attention import PrunedAttention
from gohsp.structure import (
    FIELDS,
    PARAMS,
    Attention,
    AttentionKept,
    AttentionWidths,
    FfnKept,
    Kind,
    Network,
    SublayerKept,
    absent,
    cost_of,
    count_params,
    keep_everything,
    keep_none,
    kept_widths,
)

NARROW: dict[Kind, int] = {"head": 1, "qk": 3, "vo": 5, "ffn": 17}
CUTS: dict[str, tuple[Kind, ...]] = {**{kind: (kind,) for kind in NARROW}, "all": tuple(NARROW)}


@dataclass(frozen=True)
class Described:
    """A family's model, the copy that is pruned, and what they are made of."""

    name: str
    model: nn.Module
    opened: nn.Module
    network: Network
    images: Tensor


@pytest.fixture(scope="module")
def of() -> Callable[[str], Described]:
    @cache
    def get(name: str) -> Described:
        needs = ZOO[name].needs
        if needs is not None and importlib.util.find_spec(needs) is None:
            pytest.skip(f"{needs} is not installed")
        model, images = made(name), images_for(name)
        try:
            network = describe(model, images)
        except UnsupportedModelError as error:
            if "of another version of its library" not in str(error):
                raise
            pytest.skip(str(error))
        return Described(name, model, working_copy(model, images), network, images)

    return get


CUT = [(name, cut) for name, entry in ZOO.items() for cut in CUTS if cut == "all" or not entry.same]
WHOLE = [name for name, entry in ZOO.items() if not entry.same]


@pytest.fixture(scope="module", params=ZOO)
def family(request: pytest.FixtureRequest, of: Callable[[str], Described]) -> Described:
    return of(request.param)


def drawn(
    network: Network, kinds: tuple[Kind, ...], seed: int, narrow: Mapping[Kind, int] = NARROW
) -> dict[str, SublayerKept]:
    """A random cut of some kinds to odd widths, where they may be cut."""
    generator = torch.Generator().manual_seed(seed)

    def pick(have: int, kind: Kind, sub: Any) -> tuple[int, ...]:
        want = min(narrow[kind], have) if kind in kinds and kind in sub.prunable else have
        return tuple(sorted(torch.randperm(have, generator=generator)[:want].tolist()))

    kept: dict[str, SublayerKept] = {}
    for sub in network.present:
        if isinstance(sub, Attention):
            heads = pick(sub.widths.heads, "head", sub)
            qk, vo = (tuple(pick(getattr(sub.widths, FIELDS[kind]), kind, sub) for _ in heads) for kind in ("qk", "vo"))
            kept[sub.name] = AttentionKept(heads=heads, qk=qk, vo=vo)
        else:
            kept[sub.name] = FfnKept(units=pick(sub.widths.units, "ffn", sub))
    return kept


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_it_is_described_whole(family: Described) -> None:
    network = family.network
    assert count_params(network) == parameters(family.model)
    assert all(
        sub.prunable == ({"head", "qk", "vo"} if isinstance(sub, Attention) else {"ffn"}) - ZOO[family.name].held
        for sub in network.present
    )
    assert describe(family.opened, family.images) == network
    assert relative_difference(family.model, family.opened, family.images, output=tensor_in) <= EQUALITY_TOLERANCE


def test_blocks_run_alone_are_the_models_own(family: Described) -> None:
    trunk, left = open_trunk(family.opened, family.network, family.images), []

    def leave(apart: bool, _module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        left.append(args[0] + out if apart else out)

    hooks = [
        trunk.block(i)
        .get_submodule(trunk.branches.get(i, ("",))[-1])
        .register_forward_hook(partial(leave, i in trunk.branches))
        for i in range(len(trunk.blocks))
    ]
    with torch.no_grad():
        family.opened(family.images)
        for hook in hooks:
            hook.remove()
        x = trunk.enter(family.images)
        for i, expected in enumerate(left):
            x = trunk.onto(i, x)
            of_copy, x = trunk.sent(i, copy.deepcopy(trunk.block(i)), x), trunk.run(i, x)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(of_copy, x)


def test_what_readouts_read_lies_where_the_stream_has_it(family: Described) -> None:
    """The stream that enters a block and what its sub-layers add, token by token, is the stream that leaves it."""
    trunk = open_trunk(family.opened, family.network, family.images)
    with torch.no_grad():
        x = trunk.enter(family.images)
        for i, subs in enumerate(family.network.blocks.values()):
            x = trunk.onto(i, x)
            read = trunk.inputs(i, x, [sub.readout.module for sub in subs])
            left = trunk.run(i, x)
            for sub, z in zip(subs, read, strict=True):
                x = behind(family.opened, sub, x, in_stream(sub, z, len(family.images)))
            torch.testing.assert_close(x, left, rtol=1e-4, atol=1e-4)


def test_attention_is_seen_as_it_is(family: Described) -> None:
    """With the readout's input as reference: rows of probabilities times values."""
    for sub in family.network.attentions:
        model, heads = family.opened, sub.widths.heads
        x, call, read = watched(model, sub, family.images)
        with torch.no_grad():
            rows = attention_rows(model, sub, x, call)
            some = attention_rows(model, sub, x, call, torch.tensor([2, 0]))
            x = rows_of_input(model, sub, x).flatten(1, -2)
            values = nn.functional.linear(x, *rows_of(model, sub.value, heads * sub.widths.vo))
            expected = (rows @ values.unflatten(-1, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        assert rows.shape == (len(x), heads, sub.keys, sub.keys)
        torch.testing.assert_close(some, rows[:, :, [2, 0]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(read.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "norm"), [("vit_pytorch vit", "transformer.layers.0.0.norm"), ("torchvision swin", "features.1.0.norm1")]
)
def test_moments_are_of_what_queries_are_made_of(name: str, norm: str, of: Callable[[str], Described]) -> None:
    """Behind a norm that stands in the attention, and with the padding of windows that it cuts itself."""
    family, normed = of(name), []
    sub, *_ = family.network.attentions
    hook = family.opened.get_submodule(norm).register_forward_hook(lambda _m, _a, out: normed.append(out))
    moments: Any = gohsp.collect_moments(family.opened, family.network, [family.images])[sub.name]
    hook.remove()
    rows = normed[0].flatten(0, -2).double()
    expected = rows.T @ rows / (len(family.images) * sub.tokens)
    torch.testing.assert_close(moments.inputs[:-1, :-1], expected, rtol=1e-5, atol=1e-6)


def watched(model: nn.Module, sub: Attention, images: Tensor) -> tuple[Tensor, Call, Tensor]:
    """What an attention is given, and what its readout reads."""
    given: list[tuple[Tensor, Call]] = []
    read: list[Tensor] = []
    hooks = [
        model.get_submodule(sub.name).register_forward_pre_hook(
            lambda _module, args, kwargs: given.append(taken(args, kwargs)), with_kwargs=True
        ),
        model.get_submodule(sub.readout.module).register_forward_pre_hook(lambda _module, args: read.append(args[0])),
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return *given[0], read[0]


@pytest.mark.parametrize(("name", "cut"), CUT)
def test_a_cut_model_computes_what_the_masked_one_does(name: str, cut: str, of: Callable[[str], Described]) -> None:
    family = of(name)
    network, kept = family.network, drawn(family.network, CUTS[cut], seed=7)
    if kept_widths(kept) == network.widths:
        pytest.skip("this family holds that kind")
    before = copy.deepcopy(family.opened.state_dict())
    compaction = compact(family.opened, kept, family.images)  # which masks, and compares
    assert compaction.max_relative_difference <= EQUALITY_TOLERANCE
    assert relative_difference(family.model, compaction.model, family.images, output=tensor_in) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in family.opened.state_dict().items())
    after = describe(compaction.model, family.images)
    assert after.widths == kept_widths(kept)
    assert count_params(after) == parameters(compaction.model) == cost_of(network, kept_widths(kept), PARAMS)
    if cut == "all":  # and once more, from our own attention
        fewer = drawn(after, ("head", "vo", "ffn"), seed=1, narrow={"head": 1, "vo": 3, "ffn": 9})
        again = compact(compaction.model, fewer, family.images)
        assert again.max_relative_difference <= EQUALITY_TOLERANCE
        assert describe(again.model, family.images).widths == kept_widths(fewer)


def test_what_may_go_altogether_leaves_a_vector(family: Described) -> None:
    network, kept = family.network, keep_everything(family.network)
    gone = {type(sub): sub for sub in network.present if sub.removable}.values()  # the last of either type
    if not gone:
        pytest.skip("nothing of this family may go altogether")
    kept |= {sub.name: keep_none(sub.widths) for sub in gone}
    compaction = compact(family.opened, kept, family.images)
    assert compaction.max_relative_difference <= EQUALITY_TOLERANCE
    after = describe(compaction.model, family.images)
    assert after.widths == kept_widths(kept)
    assert count_params(after) == parameters(compaction.model) == cost_of(network, kept_widths(kept), PARAMS)


def test_blocks_with_nothing_in_them_can_be_timed(family: Described) -> None:
    if "torch encoder" in family.name:
        pytest.skip("PyTorch's layer looks into its attention")
    empty = resized(family.opened, {name: absent(of) for name, of in family.network.widths.items()})
    with torch.no_grad():
        assert tensor_in(empty(family.images)).isfinite().all()


@pytest.mark.parametrize("name", WHOLE)
def test_it_goes_the_whole_way(
    name: str, of: Callable[[str], Described], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Pruned by one call, its dense twin cut on loading, pruned once more."""
    family, images = of(name), list(images_for(name, 24).split(8))
    caplog.set_level(logging.CRITICAL)  # of few images that the repair is singular is known
    before = copy.deepcopy(family.model.state_dict())
    config = Config()
    config = replace(config, heal=replace(config.heal, epochs=1), ranking=replace(config.ranking, method="chain"))
    pruned = gohsp.prune(family.model, images, ZOO[name].budget, config=config)
    assert all(torch.equal(value, before[key]) for key, value in family.model.state_dict().items())
    limit = parameters(family.model) * (1 + float(ZOO[name].budget[7:-1]) / 100)
    assert 0.95 * limit <= parameters(pruned.model) <= limit
    assert set(pruned.ranking.scores) == {sub.name for sub in family.network.attentions}
    assert type(pruned.model) is type(family.model)
    with torch.no_grad():  # with gradients PyTorch takes other kernels
        returned = pruned.model(family.images)
        assert type(returned) is type(family.model(family.images))

    gohsp.save(pruned.model, tmp_path / "small", own=True)
    again = gohsp.load(tmp_path / "small", into=made(name))
    with torch.no_grad():
        torch.testing.assert_close(tensor_in(again(family.images)), tensor_in(returned), rtol=0, atol=1e-6)
    smaller = gohsp.prune(again, images, "params=-4%", config=Config())
    assert parameters(smaller.model) <= 0.96 * parameters(pruned.model)


LIBRARIES_OWN = [
    "timm post-norm",
    "timm sam classifier",
    "transformers swin v2",
    "transformers sam",
    "torchvision swin",
    "torchvision swin v2",
]


@pytest.mark.parametrize("name", LIBRARIES_OWN)
def test_its_library_makes_it_again(name: str, of: Callable[[str], Described], tmp_path: Any) -> None:
    family = of(name)
    small = compact(family.opened, drawn(family.network, ("head", "vo", "ffn"), seed=5), family.images).model
    gohsp.save(small, tmp_path / "small")
    again = gohsp.load(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(tensor_in(again(family.images)), tensor_in(small(family.images)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_admm_pulls_it_to_the_sparsity_set(name: str, of: Callable[[str], Described]) -> None:
    family = of(name)
    network, work = family.network, copy.deepcopy(family.opened)
    widths: Mapping[str, Any] = kept_widths(drawn(network, ("vo", "ffn"), seed=3))
    moments = gohsp.collect_moments(work, network, [family.images])
    settings = AdmmSettings(interval=1, rho_start=0.05, rho_end=0.5)
    state = admm.start(work, network, widths, moments, None, settings)
    optimizer = torch.optim.AdamW(work.parameters(), lr=1e-3)
    for step in (1, 2):
        tensor_in(work(family.images)).square().mean().backward()
        admm.add_penalty_gradients(state)
        optimizer.step()
        optimizer.zero_grad()
        state = admm.after_step(state, progress=step / 2)
    assert state.trace[1].primal < state.trace[0].primal
    kept = admm.finish(state)
    assert kept_widths(kept) == widths
    assert compact(work, kept, family.images).max_relative_difference <= EQUALITY_TOLERANCE


@pytest.mark.parametrize("grid", [(4, 4), (6, 5)])
def test_vectors_of_distances_are_resampled_for_a_grid_of_another_size(grid: tuple[int, int]) -> None:
    own = sam.Attention(32, 4, use_rel_pos=True, input_size=(4, 4)).eval()
    (layout,) = families.timm.KNOWN.attentions["timm.models.vision_transformer_sam.Attention"]
    ours = PrunedAttention(own, layout, AttentionWidths(heads=4, qk=8, vo=8))
    nn.init.normal_(own.rel_pos_h)
    nn.init.normal_(own.rel_pos_w)
    ours.load_state_dict(own.state_dict())
    x = torch.randn(2, *grid, 32)
    torch.testing.assert_close(ours(x), own(x), rtol=1e-4, atol=1e-5)


def test_a_classifier_that_returns_a_model_output_is_trained_and_scored(of: Callable[[str], Described]) -> None:
    family = of("transformers vit")
    images = images_for("transformers vit", 32)
    labels = tensor_in(family.model(images)).argmax(-1).detach()
    batches = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 32, 8)]
    config = from_mapping({"finetune": {"epochs": 2}, "admm": {"epochs": 1}, "training": {"mixup": 0.0, "cutmix": 0.0}})
    assert evaluate(family.model, batches).top1 == 100
    for method in ("finetune", "gohsp"):
        pruned = gohsp.prune(family.model, batches, "params=-15%", method=method, validation=batches, config=config)
        assert [epoch.top1 is not None for epoch in pruned.finetune] == [True, True]
        assert type(pruned.model) is type(family.model)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ViTModel", {"hidden_act": "../gelu"}),
        ("ViTModel", {"image_size": "32"}),
        ("ViTModel", {"auto_map": "code"}),
        ("ViTModel", {"id2label": {"0": ["a"]}}),
        ("BertModel", {}),
        ("pipeline", {}),
        ("os.system", {}),
    ],
)
def test_a_file_names_no_other_class_and_no_text_that_is_no_setting(name: str, arguments: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    spec = {"library": "transformers", "architecture": name, "arguments": arguments}
    with pytest.raises(CheckpointError):
        check_specification(spec, "a file")
    check_specification({**spec, "architecture": "ViTModel", "arguments": {"hidden_act": "relu"}}, "a file")


# A family of one's own; the page's is described by test_docs


class OwnAttention(nn.Module):
    __module__, __qualname__ = "mine", "Attention"

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    __module__ = "mine"

    def __init__(self, dim: int, units: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, units), nn.Linear(units, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Listed(nn.Module):
    """Attentions and FFNs in lists that nothing calls, with what they return added outside."""

    def __init__(self, between: float = 1.0) -> None:
        super().__init__()
        self.patch, self.between = nn.Conv2d(3, 32, 8, 8), between
        self.layers = nn.ModuleList(nn.ModuleList([OwnAttention(32, 4), FeedForward(32, 48)]) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        for attn, ff in self.layers:
            x = attn(x) + x
            x = self.between * (ff(x) + x)
        return x


def test_parts_of_ones_own_that_are_called_one_by_one_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gohsp.families, "_known", gohsp.families._known)  # forgotten after this test
    maps = families.AttentionMaps(
        **{name: (f"to_{name[0]}.weight", f"to_{name[0]}.bias") for name in ("query", "key", "value")}, readout="to_out"
    )
    layout = families.Layout(attention=families.Branch(module="0"), ffn=families.Branch(module="1"), apart=True)
    families.register(
        families.Known(
            blocks={("mine.Attention", "mine.FeedForward"): (layout,)},
            attentions={
                "mine.Attention": (families.AttentionLayout(maps=maps, heads="heads", scale=None, dropout=None),)
            },
            ffns={"mine.FeedForward": (families.FfnLayout(inputs=("up",), readout="down"),)},
        )
    )
    model, images = Listed().eval(), images_for("torch encoder layer")
    network = describe(model, images)
    assert network.apart == {"layers.0", "layers.1"}
    small = compact(model, drawn(network, ("head", "qk", "vo", "ffn"), seed=3), images).model  # which compares
    assert describe(small, images).apart == network.apart
    with pytest.raises(UnsupportedModelError, match=r"something stands before block 'layers\.1'"):
        open_trunk(Listed(between=2.0).eval(), network, images)
