"""Pruning in memory: a model and images in, an ordinary smaller module out.

:func:`prune` does everything; its parts stand alone, each on a model and an iterable of images. Nothing here reads or
writes a folder, and nothing prints.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gohsp import models, steps
from gohsp.config import Config, Method, settled
from gohsp.core import admm, allocation
from gohsp.core.allocation import Curves
from gohsp.core.curves import fits
from gohsp.core.objective import Objective, require_objective, resolve_objective
from gohsp.core.ranking import HeadRanking
from gohsp.data.calibration import CalibrationSet, calibration_set, peeked
from gohsp.data.spool import Spool
from gohsp.errors import ConfigError, DataError, PlanError, UnsupportedModelError
from gohsp.evaluation import Metrics, evaluate
from gohsp.runtime import ProgressCallback, resolve_precision, unheard
from gohsp.session import Session
from gohsp.steps import Allocation, Fidelity, Healing
from gohsp.structure import (
    COUNTED,
    Budget,
    Network,
    SublayerKept,
    SublayerWidths,
    Widths,
    amount,
    bound_for,
    check_widths,
    cost_of,
    excluding,
    parse_budget,
)
from gohsp.training import Batches, Epoch, require_optimizer, train

logger = logging.getLogger(__name__)

LOSS_BATCHES = 16
"""Training batches on which the loss before and after the cut is compared."""

ObjectiveLike = Objective | str | Callable[[Any], Tensor] | None
"""What :func:`gohsp.core.objective.resolve_objective` takes."""


@dataclass(frozen=True)
class SoftPruning:
    """How the ADMM stage went.

    Attributes:
        status: ``converged`` or ``not converged``.
        kept: The support that it ended with.
        trace: One record a Z-step.
        curve: Its epochs.
    """

    status: str
    kept: Mapping[str, SublayerKept]
    trace: tuple[admm.Residuals, ...]
    curve: tuple[Epoch, ...]


@dataclass(frozen=True)
class Cut:
    """What stays of a network, and after ADMM the training loss around the cut."""

    kept: Mapping[str, SublayerKept]
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass(frozen=True)
class Trained:
    """The epochs of a training stage."""

    curve: tuple[Epoch, ...]


@dataclass(frozen=True)
class Pruned:
    """A pruned model, and how it came about.

    Attributes:
        model: The small dense model, in evaluation mode.
        network: Description of the dense model.
        widths: Widths of what is left of every sub-layer.
        kept: The units that stayed, as indices into the dense model.
        ranking: The heads' ranking.
        allocation: How the widths were chosen.
        fidelity: The cut model against the dense one on held-out images, before any fine-tuning.
        equality: Largest relative difference of the compacted from the masked model's outputs, on a few images.
        heal: Tuning of blocks after the cut; None where none was asked for.
        soft: The ADMM stage; None but of method ``gohsp``.
        cut: The cut, with the training loss around it after ADMM.
        finetune: Epochs of fine-tuning; none of method ``oneshot``.
        seconds: Time by step.
    """

    model: nn.Module
    network: Network
    widths: Mapping[str, SublayerWidths]
    kept: Mapping[str, SublayerKept]
    ranking: HeadRanking
    allocation: Allocation
    fidelity: Fidelity
    equality: float
    heal: Healing | None
    soft: SoftPruning | None
    cut: Cut
    finetune: tuple[Epoch, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Labelled:
    """Labelled images, for methods that train.

    Attributes:
        train: Batches to train on.
        evaluate: Scores a model on validation images; None without any.
        sample: Training images as in evaluation.
        classes: How many classes the labels number.
        checkpoint: Names the file of a stage for resuming; None of a stage that cannot be resumed.
    """

    train: Batches
    evaluate: Callable[[nn.Module], Metrics] | None
    sample: Callable[[], Iterable[Any]]
    classes: int
    checkpoint: Callable[[str], Path | None] = field(default=lambda _stage: None)


# In one call


def prune(
    model: nn.Module,
    images: Iterable[Any],
    budget: str,
    *,
    method: Method | None = None,
    at: str | None = None,
    uniform: bool | None = None,
    objective: ObjectiveLike = None,
    exclude: Sequence[str] = (),
    widths: Widths | None = None,
    curves: Curves | None = None,
    validation: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    config: Config | None = None,
    progress: ProgressCallback | None = None,
) -> Pruned:
    """Prune a Vision Transformer, or a model with one inside, to a budget.

    Args:
        model: The model, left as it is. It is pruned on the device where it is and in float32, and all weights are
            trained by methods that train; what is made of it has its data types again, and what was frozen is. It is
            taken out of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, and a warning says so.
        images: Preprocessed images: a ``DataLoader``, or any iterable of tensors ``[C, H, W]`` or ``[B, C, H, W]``, of
            pairs that begin with one, or of mappings that hold one. The first 1,152 are read (``config.calibration``),
            and no label; methods that train take all of it, in pairs, anew in every epoch. A model that takes more than
            images is called with what else the first mapping holds by the names of its arguments; of what has an entry
            for each image, with the first, for all images.
        budget: Such as ``params=-40%`` or ``macs=0.8G``, an upper bound that is met within 1 %; or ``latency=-25%``
            of the time that the dense model takes on its device.
        method: ``oneshot``, ``finetune`` or ``gohsp``; None takes the configuration's, by default ``oneshot``.
        at: Name of the module that is pruned, such as ``vision_model``. The rest of the model is left as it is, and
            need not be known; the budget is of the whole model. None takes the configuration's, by default all of it.
        uniform: Whether all blocks get one width of each kind, so that the model's library makes the result by its own
            settings, and loads it without gohsp (:func:`gohsp.save_plain`). What the settings cannot say is not cut,
            and a warning names it. None takes the configuration's, by default False.
        objective: What the output is for; None infers it (:func:`gohsp.core.objective.resolve_objective`).
        exclude: What to leave alone: names of sub-layers or of modules that hold some, or kinds of unit.
        widths: Widths to use instead of choosing them.
        curves: Damage curves of this model that :func:`measure_curves` gave, to choose widths by.
        validation: Batches of images and labels to score on while training; None for no scores.
        calibration: Images as in evaluation, where those to train on are augmented; None takes ``images``.
        config: All other settings; None for the defaults.
        progress: Is told how far each step is.

    Returns:
        The pruned model, and how it came about.

    Raises:
        GohspError: One of its kinds, for bad input; before any work is begun wherever that can be known.
    """
    config = settled(config)
    if method is not None:
        config = replace(config, method=method)
    if at is not None:
        config = replace(config, at=at)
    if uniform is not None:
        config = replace(config, uniform=uniform)
    model = models.unwrapped(model)
    goal, unlabelled = parse_budget(budget), images if calibration is None else calibration
    example, unlabelled = _example(model, unlabelled, config.at)
    dense, network = _checked(model, example, goal, exclude, widths, curves, config)
    if config.trains:
        require_optimizer(config.training.optimizer)
        _require_rereadable("trains on the images", config, images)
        _require_rereadable("scores on validation images", config, validation)
    tell_budget(network, goal)
    session = open_session(dense, unlabelled, config=config, objective=objective, progress=progress)
    labelled = _labelled(session, dense, images, validation) if config.trains else None
    pruned = run_steps(session, dense, network, goal, given=widths, measured=curves, labelled=labelled)
    models.finished(pruned.model, model)
    return pruned


def _example(model: nn.Module, images: Iterable[Any], at: str) -> tuple[models.Example | None, Iterable[Any]]:
    """What to describe a model with, where it does not tell what size it takes or takes more, and all images again."""
    models.blocks_of(model, at)  # what has none is refused before an image is read
    told = models.told_size(model) is not None and not models.takes_more(model)
    return (None, images) if told else peeked(images)


def _checked(
    model: nn.Module,
    example: models.Example | None,
    goal: Budget,
    exclude: Sequence[str],
    widths: Widths | None,
    curves: Curves | None,
    config: Config,
) -> tuple[nn.Module, Network]:
    """A copy of the model and its description, after all that can be known to fail has been tried."""
    dense = models.working_copy(model, example, config.at)
    models.check_finite(dense)
    network = excluding(models.describe(dense, example, config.at), exclude)
    _require_curves_of(network, curves, config)
    network = to_cut(dense, network, config)
    require_possible(network, goal, widths, config)
    return dense, network


def to_cut(model: nn.Module, network: Network, config: Config) -> Network:
    """What may be cut of a network: all of it, or with ``uniform`` what settings of the model's library can say.

    Raises:
        UnsupportedModelError: They can say nothing of it.
    """
    return models.sayable(model, network, config.widths) if config.uniform else network


def require_possible(network: Network, goal: Budget, widths: Widths | None, config: Config) -> None:
    """Check that a budget can be met by widths that are allowed, or that are given.

    Raises:
        PlanError: Given widths do not fit the network or the budget, or are given though they are to be uniform.
        BudgetError: No allowed widths meet the budget.
        ConfigError: Floors or steps of widths are above what the network has.
    """
    if not any(sub.prunable or sub.removable for sub in network.present):
        raise PlanError("nothing of this model may be cut: all of its sub-layers are excluded, or gone already")
    if widths is not None:
        if config.uniform:
            raise PlanError("uniform chooses the widths of all blocks, and widths are given; leave one of them out")
        check_widths(network, widths)
    else:
        allocation.require_fitting(network, config.widths)
    if goal.kind == "latency":
        return
    bound = bound_for(network, goal)
    if widths is not None:
        if not bound.met(network, widths):
            kind = goal.kind
            raise PlanError(
                f"the given plan costs {amount(kind, bound.of(network, widths))}, the budget allows "
                f"{amount(kind, bound.limit)}; cut more"
            )
    else:
        allocation.require_feasible(network, bound, config.widths, uniform=config.uniform)


def tell_budget(network: Network, goal: Budget) -> None:
    """Say in the log what a budget was understood to be; ``network`` is the dense one."""
    if goal.kind != "latency":
        dense = cost_of(network, network.widths, COUNTED[goal.kind])
        most = f"{goal.limit(dense):,} of {amount(goal.kind, dense)}"
    elif goal.relative:
        most = f"{100 * goal.number:g} % of the time that the dense model takes, which is measured on the way"
    else:
        most = amount("latency", goal.number)
    logger.info("budget %s: at most %s", goal.requested.strip(), most)


def open_session(
    model: nn.Module,
    images: Iterable[Any] | CalibrationSet,
    *,
    config: Config | None = None,
    objective: ObjectiveLike = None,
    progress: ProgressCallback | None = None,
) -> Session:
    """Take images and settle everything that the steps of a pruning need.

    Raises:
        DataError: There are no images, or of another kind.
        UnsupportedModelError: The model's output fits no objective, or not the one given.
    """
    config = settled(config)
    settings = config.calibration
    require_objective(objective)
    if not isinstance(images, CalibrationSet):
        images = calibration_set(
            images, count=settings.images, holdout=settings.holdout, mirror=settings.mirror, store=Spool
        )
    widest = models.describe(model, images.first(1)[0], config.at).embed_dim
    if images.count < widest:
        logger.warning(
            "%d calibration images are fewer than the model's %d channels: too few to tell what each part of the model "
            "does, so that more accuracy than necessary is lost; give %d images or more, without labels",
            images.count,
            widest,
            4 * widest,
        )
    device = next(model.parameters()).device
    return Session(
        config,
        images,
        resolve_objective(objective, model, images.first(8)[0]),
        resolve_precision(config.precision, device),
        progress=progress or unheard,
    )


def _require_rereadable(does: str, config: Config, batches: Iterable[Any] | None) -> None:
    """Refuse what can be read once, where it is read in every epoch; what is no iterable is refused elsewhere."""
    if isinstance(batches, Iterable) and (isinstance(batches, Iterator) or not _has_length(batches)):
        raise DataError(
            f"method '{config.method}' {does} in every epoch; give a DataLoader or a list, not a "
            f"{type(batches).__name__} that can be read once or tells no length"
        )


def _has_length(batches: Any) -> bool:
    try:
        return len(batches) >= 0
    except TypeError:  # a DataLoader of a data set that has none
        return False


def _labelled(session: Session, dense: nn.Module, images: Iterable[Any], validation: Iterable[Any] | None) -> Labelled:
    classes = _require_classifier(session, dense)
    _require_pairs(session.config, "images", images, classes)
    if validation is not None:
        _require_pairs(session.config, "validation", validation, classes)

    def score(model: nn.Module) -> Metrics:
        assert validation is not None
        return evaluate(model, validation, precision=session.precision)

    return Labelled(images, None if validation is None else score, lambda: images, classes)  # type: ignore[arg-type]


def _require_pairs(config: Config, name: str, batches: Iterable[Any], classes: int) -> None:
    """Check the first batch of images and labels."""
    first = next(iter(batches), None)
    pair = isinstance(first, tuple | list) and len(first) == 2 and all(isinstance(part, Tensor) for part in first)
    if first is None or not pair or first[0].ndim != 4 or first[1].shape != first[0].shape[:1] or not len(first[1]):
        raise DataError(
            f"method '{config.method}' needs {name} in pairs of images [B, C, H, W] and labels [B], got a "
            f"{type(first).__name__}{_shapes(first)}; method 'oneshot' needs no labels"
        )
    labels = first[1]
    if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels in {name} must be whole numbers from 0 to {classes - 1}, for the model's {classes} classes; got "
            f"{labels.dtype} from {labels.min()} to {labels.max()}"
        )


def _shapes(batch: Any) -> str:
    if not isinstance(batch, tuple | list):
        return ""
    return f" of {[list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in batch[:3]]}"


def _require_classifier(session: Session, dense: nn.Module) -> int:
    """Classes of the model; methods that train with labels need some."""
    if session.objective.name != "classification":
        raise UnsupportedModelError(
            f"method '{session.config.method}' trains with labels, and this model's output is taken for "
            f"{session.objective.name}; use method 'oneshot', or give objective='classification' if it returns logits"
        )
    return session.outputs(dense, [session.probe[:1]])[0].shape[1]


# The steps, for this layer and for runs


def run_steps(
    session: Session,
    dense: nn.Module,
    network: Network,
    goal: Budget,
    *,
    given: Widths | None = None,
    measured: Curves | None = None,
    labelled: Labelled | None = None,
    chosen: Callable[[Widths], None] = lambda _widths: None,
) -> Pruned:
    """Do the steps of a method, one after the other.

    Args:
        session: Settings, images, objective; its ``steps`` may keep results and restore them.
        dense: The dense model; left as it is.
        network: Its description.
        goal: The budget.
        given: Widths to use instead of choosing them.
        measured: Damage curves that were measured already.
        labelled: Images and labels; for methods that train.
        chosen: Is told the widths.
    """
    do, config = session.steps.do, session.config
    analysis = do("rank", steps.Analysis, lambda: steps.analyse(session, dense, network))
    allocated = do(
        "allocate",
        Allocation,
        lambda: steps.choose_widths(session, dense, network, analysis, goal, given=given, measured=measured),
    )
    widths = allocated.widths
    chosen(widths)
    work, soft = copy.deepcopy(dense), None
    if config.method == "gohsp" and labelled is not None:
        soft = _soft_pruned(session, dense, work, network, analysis, widths, labelled)
    made = do("cut", Cut, lambda: _cut(session, dense, work, network, analysis, widths, soft, labelled), work)
    compaction = steps.compact(session, work, made.kept)
    small, healed = compaction.model, None
    if config.heal.epochs > 0:
        healed = do("heal", Healing, lambda: steps.heal(session, dense, small, network, analysis), small)
    fidelity = steps.compare(session, dense, small)
    tuned: tuple[Epoch, ...] = ()
    if config.trains and labelled is not None and config.finetune.epochs > 0:
        tuned = do("finetune", Trained, lambda: train_stage(session, "finetune", small, dense, labelled), small).curve
    return Pruned(
        model=(models.remade(small, config.at) if config.uniform else small).eval(),
        network=network,
        widths=widths,
        kept=made.kept,
        ranking=analysis.ranking,
        allocation=allocated,
        fidelity=fidelity,
        equality=compaction.max_relative_difference,
        heal=healed,
        soft=soft,
        cut=made,
        finetune=tuned,
        seconds=dict(session.steps.seconds),
    )


def _soft_pruned(
    session: Session,
    dense: nn.Module,
    work: nn.Module,
    network: Network,
    analysis: steps.Analysis,
    widths: Widths,
    labelled: Labelled,
) -> SoftPruning:
    """The ADMM stage: ``work`` is trained towards the sparsity set."""
    support = None
    if session.config.admm.metric == "data":
        # Cut and repaired first: what ADMM then pulls to is a network that works. Units outside the support are alive
        # through what they read, and may come back. (Masked in a metric of weights they would be dead.)
        repaired = session.steps.do(
            "repair", Cut, lambda: Cut(steps.cut(session, dense, work, network, analysis, widths)), work
        )
        support = repaired.kept

    def trained() -> SoftPruning:
        config = session.config
        state = admm.start(
            work,
            network,
            widths,
            steps.collect_moments(session, work, network, analysis),
            analysis.ranking.scores,
            config.admm.settings,
            repair=config.repair,
            support=support,
        )
        result = train(
            work,
            labelled.train,
            config.admm.stage,
            config.training,
            name="admm",
            precision=session.precision,
            seed=config.seed + 1,
            num_classes=labelled.classes,
            evaluate=labelled.evaluate,
            teacher=dense,
            state=state,
            refresh=lambda state: admm.refresh(state, steps.collect_moments(session, work, network, analysis)),
            checkpoint=labelled.checkpoint("admm"),
            schedule="constant",
            progress=session.progress,
        )
        assert result.admm is not None
        return SoftPruning(result.admm.status, result.admm.kept, result.admm.trace, result.curve)

    return session.steps.do("admm", SoftPruning, trained, work)


def _cut(
    session: Session,
    dense: nn.Module,
    work: nn.Module,
    network: Network,
    analysis: steps.Analysis,
    widths: Widths,
    soft: SoftPruning | None,
    labelled: Labelled | None,
) -> Cut:
    """Put ``work`` on the sparsity set of ``widths``, repaired."""
    if soft is None or labelled is None:
        return Cut(steps.cut(session, dense, work, network, analysis, widths))
    metric = session.config.admm.metric
    before = _training_loss(session, work, labelled)
    if metric == "data":
        kept = steps.cut(session, dense, work, network, analysis, widths, support=soft.kept)
    else:
        kept = steps.masked(session, work, network, analysis, widths, metric, support=soft.kept)
    return Cut(kept, before, _training_loss(session, work, labelled))


def _training_loss(session: Session, model: nn.Module, labelled: Labelled) -> float:
    """Cross entropy on a fixed sample of training images, as in evaluation."""
    batches = (batch for batch, _ in zip(labelled.sample(), range(LOSS_BATCHES), strict=False))
    return evaluate(model, batches, precision=session.precision).loss


def train_stage(
    session: Session,
    name: str,
    model: nn.Module,
    teacher: nn.Module | None,
    labelled: Labelled,
    epochs: int | None = None,
) -> Trained:
    """Train a model in place as the settings say for ``name``, ``dense`` or ``finetune``, or for other ``epochs``."""
    config = session.config
    stage = config.dense if name == "dense" else config.finetune
    result = train(
        model,
        labelled.train,
        stage if epochs is None else replace(stage, epochs=epochs),
        config.training,
        name=name,
        precision=session.precision,
        seed=config.seed,
        num_classes=labelled.classes,
        evaluate=labelled.evaluate,
        teacher=teacher,
        checkpoint=labelled.checkpoint(name),
        progress=session.progress,
    )
    return Trained(result.curve)


# The parts alone


def rank(
    model: nn.Module,
    images: Iterable[Any],
    *,
    objective: ObjectiveLike = None,
    config: Config | None = None,
    progress: ProgressCallback | None = None,
) -> HeadRanking:
    """Rank all heads of a model on images, without labels, in one pass over them for each of ``ranking.steps``.

    Args:
        model: The model; left as it is.
        images: As of :func:`prune`; the first 256 are read.
        objective: As of :func:`prune`.
        config: Of which ``at``, ``ranking``, ``seed`` and ``precision`` count.
        progress: Is told how far it is.

    Raises:
        DataError: No images.
        NonFiniteError: NaN or infinity in weights or activations.
        UnsupportedModelError: The model cannot be described, or has no attention.
    """
    session, dense, network = _open(model, images, (), objective, config, progress)
    return steps.analyse(session, dense, network).ranking


def measure_curves(
    model: nn.Module,
    images: Iterable[Any],
    *,
    objective: ObjectiveLike = None,
    exclude: Sequence[str] = (),
    config: Config | None = None,
    progress: ProgressCallback | None = None,
) -> Curves:
    """Damage curves of a model: what cutting each piece alone to several widths does to its output.

    They serve several budgets: hand them to :func:`allocate`, or to :func:`prune` as ``curves``.

    Args:
        model: The model; left as it is.
        images: As of :func:`prune`.
        objective: As of :func:`prune`.
        exclude: As of :func:`prune`.
        config: Of which ``at``, ``widths``, ``ranking``, ``repair``, ``calibration``, ``seed`` and ``precision`` count.
        progress: Is told how far it is.
    """
    session, dense, network = _open(model, images, exclude, objective, config, progress)
    return steps.measure_curves(session, dense, network, steps.analyse(session, dense, network))


def allocate(
    model: nn.Module | Network,
    curves: Curves,
    budget: str,
    *,
    exclude: Sequence[str] = (),
    config: Config | None = None,
) -> dict[str, SublayerWidths]:
    """Widths of least damage within a budget of parameters or MACs.

    Args:
        model: The model that the curves are of, or its description.
        curves: What :func:`measure_curves` gave.
        budget: Such as ``params=-40%``.
        exclude: As of :func:`prune`.
        config: Of which ``at`` (of a model), ``widths`` and ``uniform`` count. With ``uniform`` a model is cut in what
            settings of its library can say; a description alone, in all that may be cut.

    Raises:
        BudgetError: No allowed widths meet the budget.
        ConfigError: It is one of latency, which has to be measured on the way (:func:`prune` does).
        PlanError: The curves are not of this model.
    """
    config = settled(config)
    network = excluding(model if isinstance(model, Network) else models.describe(model, at=config.at), exclude)
    goal = parse_budget(budget)
    if goal.kind == "latency":
        raise ConfigError("a latency budget is met by measuring on the way; use gohsp.prune, which takes curves, too")
    _require_curves_of(network, curves, config)
    if isinstance(model, nn.Module):
        network = to_cut(model, network, config)
    return allocation.allocate(network, curves, bound_for(network, goal), config.widths, uniform=config.uniform)


def _require_curves_of(network: Network, curves: Curves | None, config: Config) -> None:
    """Check that damage curves were measured on a network like this one, at the widths that are allowed now."""
    if curves is not None and not fits(curves, network, config.widths):
        raise PlanError(
            "the damage curves are of another model, or were measured with other settings of 'widths' or another "
            "'exclude'; measure them with gohsp.measure_curves as they are to be used"
        )


@dataclass(frozen=True)
class CutModel:
    """A model that was cut and repaired, its shapes being as before.

    Attributes:
        model: The model, in which units that do not stay are zero.
        kept: What stays, for :func:`compact`.
    """

    model: nn.Module
    kept: Mapping[str, SublayerKept]


def cut(
    model: nn.Module,
    images: Iterable[Any],
    widths: Widths,
    *,
    ranking: HeadRanking | None = None,
    objective: ObjectiveLike = None,
    config: Config | None = None,
    progress: ProgressCallback | None = None,
) -> CutModel:
    """Choose units to keep at given widths, and make those that stay do the work of all.

    Args:
        model: The model; left as it is.
        images: As of :func:`prune`.
        widths: Widths of all its sub-layers.
        ranking: A ranking of the model's heads (:func:`rank`); None makes one, as ``config.ranking`` says.
        objective: As of :func:`prune`.
        config: Of which ``at``, ``repair``, ``ranking``, ``calibration``, ``seed`` and ``precision`` count.
        progress: Is told how far it is.

    Raises:
        PlanError: ``widths`` or ``ranking`` do not fit the model.
    """
    config, model = settled(config), models.unwrapped(model)
    example, images = _example(model, images, config.at)
    described = models.describe(model, example, config.at)
    check_widths(described, widths)
    if ranking is not None:
        _check_ranking(described, ranking)
    session, dense, network = _open(model, images, (), objective, config, progress)
    work = copy.deepcopy(dense)
    kept = steps.cut(session, dense, work, network, steps.analyse(session, dense, network, ranking), widths)
    models.unfeed(work)
    return CutModel(work, kept)


def _check_ranking(network: Network, ranking: HeadRanking) -> None:
    """Check that every head has its score."""
    heads = {sub.name: sub.widths.heads for sub in network.attentions}
    ranked = {name: len(scores) for name, scores in ranking.scores.items()}
    if ranked != heads:
        wrong = sorted(name for name in heads | ranked if heads.get(name) != ranked.get(name))
        raise PlanError(
            f"'ranking' is of another model: heads of '{wrong[0]}' in the ranking: {ranked.get(wrong[0], 0)}, in this "
            f"model: {heads.get(wrong[0], 0)}; rank this model with gohsp.rank, or leave 'ranking' out"
        )


def heal(
    model: nn.Module,
    dense: nn.Module,
    images: Iterable[Any],
    *,
    objective: ObjectiveLike = None,
    config: Config | None = None,
    progress: ProgressCallback | None = None,
) -> Healing:
    """Tune a cut model's blocks in place to the dense model's residual stream, as far as it helps; no label is read.

    Args:
        model: What was cut from ``dense`` and compacted.
        dense: The dense model; left as it is.
        images: As of :func:`prune`.
        objective: As of :func:`prune`.
        config: Of which ``at``, ``heal``, ``calibration``, ``seed`` and ``precision`` count; by default 3 epochs.
        progress: Is told how far it is.
    """
    config = settled(config)
    if config.heal.epochs == 0:
        config = replace(config, heal=replace(config.heal, epochs=3))
    model, dense = models.unwrapped(model), models.unwrapped(dense)
    example, images = _example(dense, images, config.at)
    session, teacher, network = _open(dense, images, (), objective, config, progress)
    with models.fed(model, example), models.trainable(model):
        return steps.heal(session, teacher, model, network, steps.analyse(session, teacher, network))


def finetune(
    model: nn.Module,
    images: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    config: Config | None = None,
    checkpoint: Path | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[Epoch, ...]:
    """Train a classifier in place as method ``finetune`` trains what it has cut; any classifier, for comparisons.

    Args:
        model: The model, on its device.
        images: Batches of images and labels, read anew in every epoch.
        teacher: The dense model, whose predictions count as the settings say; None for labels alone.
        validation: Batches of images and labels to score on; None for no scores.
        config: Of which ``finetune``, ``training``, ``seed`` and ``precision`` count.
        checkpoint: File for going on after an interruption, with the same arguments; its name gets a hash.
        progress: Is told how far it is.

    Returns:
        One record an epoch.

    Raises:
        DataError: Images that can be read once, or without labels.
        UnsupportedModelError: The model is no classifier.
        NonFiniteError: The loss is NaN or infinite.
    """
    config = replace(settled(config), method="finetune")
    _require_rereadable("trains on the images", config, images)
    probe = calibration_set(images, count=8, holdout=0, mirror=False)
    session = Session(
        config,
        probe,
        resolve_objective(None, model, probe.images[0]),
        resolve_precision(config.precision, next(model.parameters()).device),
        progress=progress or unheard,
    )
    labelled = replace(_labelled(session, model, images, validation), checkpoint=lambda _stage: checkpoint)
    return train_stage(session, "finetune", model, teacher, labelled).curve


def _open(
    model: nn.Module,
    images: Iterable[Any],
    exclude: Sequence[str],
    objective: ObjectiveLike,
    config: Config | None,
    progress: ProgressCallback | None,
) -> tuple[Session, nn.Module, Network]:
    config, model = settled(config), models.unwrapped(model)
    example, images = _example(model, images, config.at)
    dense = models.working_copy(model, example, config.at)
    models.check_finite(dense)
    network = excluding(models.describe(dense, example, config.at), exclude)
    return open_session(dense, images, config=config, objective=objective, progress=progress), dense, network
