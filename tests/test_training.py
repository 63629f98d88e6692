"""Training stages on a tiny model and synthetic digits: losses by hand, resuming, ADMM's pull, what is put back."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import gohsp
from gohsp import data, runtime, training
from gohsp.config import StageSettings, TrainingSettings
from gohsp.core import admm, rotation
from gohsp.core.moments import collect_moments
from gohsp.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from gohsp.evaluation import Metrics, evaluate
from gohsp.structure import AttentionWidths, FfnWidths

CLASSES = 4
PLAIN = TrainingSettings(batch_size=16, label_smoothing=0.0, distillation=0.0)
CONSTANT = StageSettings(epochs=2, learning_rate=3e-3, warmup=0.0)


def tiny(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **{**small, "num_classes": CLASSES, **arguments})


def sharp(seed: int = 0) -> nn.Module:
    """A model whose predictions are far from uniform."""
    model = tiny()
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(seed))  # type: ignore[union-attr]
    return model


class EpochSampler(Sampler[int]):
    """A shuffled order that depends on the epoch that is set, and on nothing else."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def samples(count: int) -> tuple[Tensor, Tensor]:
    """One noisy prototype a class."""
    generator = torch.Generator().manual_seed(5)
    prototypes = torch.randn(CLASSES, 1, 8, 8, generator=generator)
    labels = torch.arange(count) % CLASSES
    return prototypes[labels] + 0.5 * torch.randn(count, 1, 8, 8, generator=generator), labels


def batches(count: int = 64, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(count)), batch_size=batch_size, sampler=EpochSampler(count))


def train(
    model: nn.Module, loader: DataLoader[Any], stage: StageSettings, settings: TrainingSettings = PLAIN, **options: Any
) -> training.StageResult:
    fixed = {"name": "test", "precision": torch.float32, "seed": 0, "num_classes": CLASSES, "schedule": "constant"}
    return training.train(model, loader, stage, settings, **{**fixed, **options})


def test_every_seed_of_32_bits_trains() -> None:
    result = train(tiny(), batches(16), CONSTANT, seed=2**32 - 1)
    assert len(result.curve) == CONSTANT.epochs


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fused(model: nn.Module) -> bool:
    """Whether all blocks use the fused attention kernel."""
    return all(b.attn.fused_attn for b in model.blocks)  # type: ignore[union-attr]


# The loop


def test_loss_falls_and_accuracy_rises_within_two_epochs():
    model, scored = tiny(), batches()
    before = evaluate(model, scored)
    result = train(model, batches(128), CONSTANT, evaluate=lambda m: evaluate(m, scored))
    assert [e.epoch for e in result.curve] == [1, 2]
    assert result.curve[1].train_loss < result.curve[0].train_loss < before.loss
    assert result.curve[1].top1 is not None
    assert result.curve[1].top1 > max(60.0, before.top1)
    assert result.curve[1].top1 == evaluate(model, scored).top1
    assert result.admm is None
    assert not model.training


def test_epochs_between_evaluations_have_no_scores_but_the_last_has():
    settings = dataclasses.replace(PLAIN, evaluate_every=2)
    scored = Metrics(top1=1.0, top5=2.0, loss=3.0, n=4)
    stage = dataclasses.replace(CONSTANT, epochs=3)
    result = train(tiny(), batches(16), stage, settings, evaluate=lambda _: scored)
    assert [(e.top1, e.loss) for e in result.curve] == [(None, None), (1.0, 3.0), (1.0, 3.0)]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_came(fails: bool):
    model, during = tiny(), []

    def scored(evaluated: nn.Module) -> Metrics:
        assert evaluated is model
        during.extend(b.attn.fused_attn for b in model.blocks)  # type: ignore[union-attr]
        if fails:
            raise KeyboardInterrupt
        return Metrics(top1=1.0, top5=2.0, loss=3.0, n=4)

    stage, half = dataclasses.replace(CONSTANT, epochs=1), torch.bfloat16
    if fails:
        with pytest.raises(KeyboardInterrupt):
            train(model, batches(16), stage, precision=half, evaluate=scored)
    else:
        train(model, batches(16), stage, precision=half, evaluate=scored)
    assert during == [False, False]
    assert fused(model)


@pytest.mark.parametrize(("schedule", "floor"), [("cosine", 1e-5), ("constant", 1e-3)])
def test_the_schedule_warms_up_and_reaches_its_floor(schedule: Any, floor: float, monkeypatch: pytest.MonkeyPatch):
    rates = []
    loss = training._Run.loss

    def recorded(self: Any, *given: Any) -> Tensor:
        rates.append(self.rate)
        return loss(self, *given)

    monkeypatch.setattr(training._Run, "loss", recorded)
    stage = StageSettings(epochs=4, learning_rate=1e-3, warmup=0.5)
    result = train(tiny(), batches(64), stage, schedule=schedule)
    assert len(rates) == 16
    assert rates[0] == pytest.approx(1e-5)
    assert rates[:3] == sorted(rates[:3])
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert result.curve[-1].learning_rate == pytest.approx(floor)


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_gradients_are_clipped(limit: float):
    """SGD's first step is as long as the rate times the gradient's norm, or times the limit where that is less."""
    stage = StageSettings(epochs=1, learning_rate=1.0, warmup=0.0)
    settings = dataclasses.replace(PLAIN, optimizer="momentum", weight_decay=0.0, clip_grad=limit)
    model = tiny()
    with torch.no_grad():
        model.head.weight.mul_(100)  # type: ignore[union-attr]
    images, labels = samples(16)
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 2
    before = weights(model)
    train(model, batches(16), stage, settings)
    torch.testing.assert_close((weights(model) - before).norm(), torch.tensor(limit) if limit else norm)


# The loss


ONE_STEP = StageSettings(epochs=1, learning_rate=1e-12, warmup=0.0)


def first_loss(model: nn.Module, settings: TrainingSettings, count: int = 16, **options: Any) -> float:
    """The loss of the weights as they are: one batch, one step."""
    loader = batches(count, batch_size=count)
    return train(model, loader, ONE_STEP, settings, **options).curve[0].train_loss


def test_labels_are_smoothed():
    settings = dataclasses.replace(PLAIN, label_smoothing=0.2)
    model = tiny().eval()
    images, labels = samples(16)
    with torch.no_grad():
        logs = model(images).log_softmax(1)
    targets = 0.8 * F.one_hot(labels, CLASSES) + 0.2 / CLASSES
    assert first_loss(model, settings) == pytest.approx(float(-(targets * logs).sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_distillation_against_a_hand_computation(share: float):
    settings = dataclasses.replace(PLAIN, distillation=share)
    student, teacher = sharp(0).eval(), sharp(1).eval()
    images, labels = samples(16)
    with torch.no_grad():
        s, t = student(images), teacher(images)
    hard = -s.log_softmax(1)[torch.arange(16), labels].mean()
    p, q = t.exp(), s.exp()
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    soft = (p * (p.log() - q.log())).sum(1).mean()
    expected = (1 - share) * hard + share * soft
    before = weights(teacher)
    assert first_loss(student, settings, teacher=teacher) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(weights(teacher), before)
    off = dataclasses.replace(settings, distillation=0.0)
    assert first_loss(student, off, teacher=teacher) == pytest.approx(float(hard), rel=1e-5)


def test_mixup_mixes_even_batches_and_leaves_odd_ones():
    mixed = dataclasses.replace(PLAIN, mixup=1.0)
    assert abs(first_loss(sharp(), mixed, count=16) - first_loss(sharp(), PLAIN, count=16)) > 0.1
    assert first_loss(sharp(), mixed, count=15) == pytest.approx(first_loss(sharp(), PLAIN, count=15), rel=1e-6)
    assert first_loss(sharp(), mixed) == first_loss(sharp(), mixed)  # drawn by the seed


def test_a_loss_that_is_not_finite_ends_the_stage():
    model = tiny()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match=r"loss of stage 'test' became NaN .* by step 1; lower its learning_rate"):
        train(model, batches(), CONSTANT)


# Resuming


def pruning_state(model: nn.Module, settings: admm.AdmmSettings) -> admm.AdmmState:
    network = gohsp.describe(model)
    images, _ = samples(32)
    moments = collect_moments(model, network, [images])
    if settings.metric == "data":
        moments = rotation.rotate(model, network, moments)
    sizes = {"attn": AttentionWidths(heads=3, qk=4, vo=6), "mlp": FfnWidths(units=64)}
    widths = {sub.name: sizes[sub.name.rpartition(".")[2]] for sub in network.sublayers}
    scores = {sub.name: (0.1, 0.4, 0.2, 0.3) for sub in network.attentions}
    return admm.start(model, network, widths, moments, scores, settings)


@pytest.mark.parametrize("where", ["evaluate", "step"])
@pytest.mark.parametrize("pull", [False, True], ids=["plain", "admm"])
def test_a_resumed_stage_ends_as_an_uninterrupted_one(
    tmp_path: Path, where: str, pull: bool, monkeypatch: pytest.MonkeyPatch
):
    stage = StageSettings(epochs=4, learning_rate=1e-3, warmup=1.0)
    settings = dataclasses.replace(PLAIN, distillation=0.5, mixup=0.4)
    pulled = admm.AdmmSettings(interval=2, reselect=3, rho_start=0.05, rho_end=0.2)
    teacher = tiny()

    def attempt(checkpoint: Path, **options: Any) -> tuple[nn.Module, training.StageResult]:
        model = tiny(drop_path_rate=0.1, proj_drop_rate=0.1)
        state = pruning_state(model, pulled) if pull else None
        fixed = {"teacher": teacher, "checkpoint": checkpoint, "seed": 3, "schedule": "cosine"}
        result = train(model, batches(), stage, settings, state=state, **fixed, **options)
        return model, result

    def refuse(_: nn.Module) -> Metrics:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Metrics(top1=1.0, top5=2.0, loss=3.0, n=4)

    calls: list[int] = []
    model, whole = attempt(tmp_path / "whole.pt", evaluate=lambda _: Metrics(top1=1.0, top5=2.0, loss=3.0, n=4))
    if where == "evaluate":
        with pytest.raises(KeyboardInterrupt):
            attempt(tmp_path / "cut.pt", evaluate=refuse)
    else:
        step, steps = training._Run.loss, []

        def broken(self: Any, *given: Any) -> Tensor:
            steps.append(1)
            if len(steps) == 11:  # in the third epoch
                raise KeyboardInterrupt
            return step(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(training._Run, "loss", broken)
            with pytest.raises(KeyboardInterrupt):
                attempt(tmp_path / "cut.pt", evaluate=refuse)
    done = torch.load(saved(tmp_path / "cut.pt"), weights_only=True)["epochs"]
    assert done == 2
    again, resumed = attempt(tmp_path / "cut.pt", evaluate=lambda _: Metrics(top1=1.0, top5=2.0, loss=3.0, n=4))
    torch.testing.assert_close(weights(again), weights(model), rtol=1e-5, atol=1e-6)
    for one, other in zip(whole.curve, resumed.curve, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert one.learning_rate == pytest.approx(other.learning_rate)
    if pull:
        assert whole.admm is not None
        assert resumed.admm is not None
        assert len(whole.admm.trace) == 8
        assert resumed.admm.kept == whole.admm.kept
        for one, other in zip(whole.admm.trace, resumed.admm.trace, strict=True):
            assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-3)


def saved(path: Path) -> Path:
    """The one sealed file that was written for ``path``."""
    (found,) = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return found


def test_a_stage_whose_epochs_are_over_is_not_trained_again(tmp_path: Path):
    first, second = tiny(), tiny()
    train(first, batches(), CONSTANT, checkpoint=tmp_path / "s.pt")
    result = train(second, batches(), CONSTANT, checkpoint=tmp_path / "s.pt")
    assert torch.equal(weights(first), weights(second))
    assert len(result.curve) == 2


@pytest.mark.parametrize("damage", ["truncated", "foreign", "flipped"])
def test_a_damaged_state_file_is_said_and_the_stage_begins_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    path, first, second = tmp_path / "s.pt", tiny(), tiny()
    whole = train(first, batches(16), CONSTANT, checkpoint=path)
    content = saved(path).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    saved(path).write_bytes({"truncated": content[:1000], "foreign": b"no state", "flipped": flipped}[damage])
    again = train(second, batches(16), CONSTANT, checkpoint=path)
    assert "is damaged" in caplog.text
    assert torch.equal(weights(first), weights(second))
    assert [e.train_loss for e in again.curve] == [e.train_loss for e in whole.curve]
    assert saved(path)


def test_the_state_file_of_another_model_is_refused(tmp_path: Path):
    train(tiny(depth=1), batches(16), CONSTANT, checkpoint=tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(tiny(), batches(16), CONSTANT, checkpoint=tmp_path / "s.pt")


# ADMM


@pytest.mark.parametrize("penalty", ["decoupled", "coupled"])
def test_admm_drives_the_residual_below_its_tolerance(penalty: Any):
    # AdamW normalises a pull that is part of the gradient, so it takes a larger penalty to be felt.
    rho = {"rho_start": 0.05, "rho_end": 0.5} if penalty == "decoupled" else {"rho_start": 1.0, "rho_end": 50.0}
    settings = admm.AdmmSettings(penalty=penalty, interval=4, dual_step=0.1, tolerance=0.05, **rho)
    model = tiny()
    stage = StageSettings(epochs=8, learning_rate=3e-3, warmup=0.0)
    free = dataclasses.replace(PLAIN, clip_grad=0.0)
    refreshed = []

    def refresh(state: admm.AdmmState) -> admm.AdmmState:
        refreshed.append(state.step)
        return state

    state = pruning_state(model, settings)
    assert state.status == "not converged"
    result = train(model, batches(), stage, free, state=state, refresh=refresh, schedule="cosine")
    assert result.admm is not None
    primal = [r.primal for r in result.admm.trace]
    assert len(primal) == 8
    assert primal[-1] < 0.05 < 0.5 * primal[0]
    assert result.admm.status == "converged"
    assert refreshed == [4, 8, 12, 16, 20, 24, 28]
    kept = admm.finish(result.admm)
    small = gohsp.compact(model, kept, samples(4)[0]).model
    assert gohsp.describe(small).widths == state.widths


# Precision


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("given", "dtype"), runtime.PRECISIONS.items())
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_given_precision_stands(given: Any, dtype: torch.dtype, device: torch.device):
    assert runtime.resolve_precision(given, device) == dtype


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A processor with some units for bf16, slow in some data type; what was found of this one is forgotten."""

    def made(*, amx: bool, avx512: bool, slow: torch.dtype | None = None) -> None:
        def slowed(values: Tensor, layer: Tensor) -> Tensor:  # and nothing that this processor is slow in
            time.sleep(0.005 * (values.dtype == slow))
            return values

        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        monkeypatch.setattr(nn.functional, "linear", slowed)
        runtime._cpu_gains_by_bf16.cache_clear()

    yield made
    runtime._cpu_gains_by_bf16.cache_clear()


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_auto_takes_bf16_where_the_processor_has_tiles_for_it(processor: Any, amx: bool, slow: torch.dtype):
    processor(amx=amx, avx512=False, slow=slow)
    assert runtime.resolve_precision("auto", CPU) == (torch.bfloat16 if amx else torch.float32)


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_with_vector_units_alone_auto_takes_what_is_faster(processor: Any, slow: torch.dtype):
    processor(amx=False, avx512=True, slow=slow)
    assert runtime.resolve_precision("auto", CPU) != slow


def test_auto_is_float32_where_torch_does_not_tell_of_units(processor: Any, monkeypatch: pytest.MonkeyPatch):
    processor(amx=True, avx512=True)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert runtime.resolve_precision("auto", CPU) == torch.float32


@pytest.mark.parametrize(
    ("device", "bf16", "expected"), [("cuda", True, "bf16"), ("cuda", False, "no"), ("xpu", 1, "no")]
)
def test_auto_on_an_accelerator(device: str, bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert runtime.resolve_precision("auto", torch.device(device)) == runtime.PRECISIONS[expected]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_weights_that_stay_float32(precision: torch.dtype):
    model, seen = tiny(), []
    model.head.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))  # type: ignore[union-attr]
    result = train(model, batches(), CONSTANT, precision=precision)
    assert result.curve[1].train_loss < result.curve[0].train_loss
    assert set(seen) == {precision}
    assert weights(model).dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_frozen_stay(compiled: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # a minute's work
    model = tiny()
    model.get_parameter("patch_embed.proj.weight").requires_grad_(False)
    before = model.get_parameter("patch_embed.proj.weight").clone()
    train(model, batches(16), CONSTANT, dataclasses.replace(PLAIN, compile=compiled))
    assert torch.equal(model.get_parameter("patch_embed.proj.weight"), before)


def test_progress_counts_steps(tmp_path: Path):
    heard: list[gohsp.Progress] = []
    train(tiny(), batches(64), CONSTANT, checkpoint=tmp_path / "s.pt", progress=heard.append)
    assert [told for told in heard if not told.metrics] == [gohsp.Progress("test", done, 8) for done in range(9)]


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"training\.optimizer 'adamww' is unknown; did you mean 'adamw'"):
        train(tiny(), batches(), CONSTANT, dataclasses.replace(PLAIN, optimizer="adamww"))


def set_fused(model: nn.Module, *fused: bool) -> None:
    for block, of in zip(model.blocks, fused, strict=True):  # type: ignore[arg-type]
        block.attn.fused_attn = of


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [True, False])
def test_attention_is_plain_on_a_cpu_in_bf16_and_then_as_it_was(before: bool, precision: torch.dtype):
    first, second = tiny(), tiny()
    set_fused(first, before, before)
    during = []

    def interrupted() -> None:
        with runtime.fast_attention(precision, first, second):
            during.extend([fused(first), fused(second)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert during == ([before, True] if precision == torch.float32 else [False, False])
    assert fused(first) == before
    assert fused(second)


def test_the_choice_of_kernel_is_put_back_by_block_and_from_the_end():
    model = tiny()
    set_fused(model, True, False)
    with runtime.fast_attention(torch.bfloat16, model, model):  # one model twice, as teacher and student say
        assert [b.attn.fused_attn for b in model.blocks] == [False, False]
    assert [b.attn.fused_attn for b in model.blocks] == [True, False]
    with (
        pytest.raises(KeyError),
        runtime.fast_attention(torch.bfloat16, model, nn.Linear(2, 2)),  # a teacher without any attention
    ):
        raise KeyError
    assert [b.attn.fused_attn for b in model.blocks] == [True, False]


# Unreadable images


def test_a_batch_of_nothing_but_unreadable_images_is_left_out(tmp_path: Path):
    for k, name in enumerate(("ant", "bee")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 60 * i + 20 * k).save(tmp_path / "train" / name / f"{i}.png")
    (tmp_path / "train" / "bee" / "z.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    split = data.open_split(data.DataSource(source=str(tmp_path)), "train")
    model = tiny(num_classes=2)
    loader = data.loader(
        split,
        transform=data.eval_transform(data.Preprocessing.from_model(model)),
        batch_size=1,
        shuffle=False,
    )
    assert len(loader) == 9
    result = train(model, loader, CONSTANT, num_classes=2, evaluate=lambda m: evaluate(m, loader))
    assert math.isfinite(result.curve[1].train_loss)
    assert len(split.unreadable) == 1
    strict = data.loader(
        split,
        transform=data.eval_transform(data.Preprocessing.from_model(model)),
        batch_size=1,
        shuffle=False,
        strict=True,
    )
    with pytest.raises(DataError, match=r"z\.jpg"):
        train(model, strict, CONSTANT, num_classes=2)


def test_apples_accelerator_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert runtime.pick_device("auto") == CPU
    assert "float64" in caplog.text
    caplog.clear()
    assert runtime.pick_device("cpu") == CPU
    assert not caplog.text
