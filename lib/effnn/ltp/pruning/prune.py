"""Post-training pruning in one call (Kwon et al. 2022; the talk's LTP pipeline): no retraining, one pass over the rows.

  1. calibrate    one forward and backward over the calibration rows: Fisher information of every mask entry;
  2. search       the best masks within the MAC or latency budget, by the diagonal Fisher;
  3. rearrange    better sets of the same sizes, by the block-diagonal Fisher;
  4. tune         real-valued scales that reconstruct a less pruned teacher, layer by layer.

The model is not changed. `PruneResult.materialize()` gives the smaller model. Not covered: decoders, embeddings, and
any further training.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from effnn.base import InvalidInput, PeakMemory
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.calibration.calibrate import Calibration, calibrate
from effnn.ltp.pruning.calibration.held_out import dense_held_out_loss, held_out_loss
from effnn.ltp.pruning.calibration.losses import Loss
from effnn.ltp.pruning.checks import check_model, check_rebuilt, checked_batches, rebuilt
from effnn.ltp.pruning.latency.correction import Attempt, Plan, measure_pair, measured_ratio, plan_latency
from effnn.ltp.pruning.latency.search import search_latency
from effnn.ltp.pruning.latency.table import Latency, LatencyTable
from effnn.ltp.pruning.macs import MacCost, Macs, search_macs
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.rearrange import rearrange as rearrange_mask
from effnn.ltp.pruning.shrinking.export import export_padded
from effnn.ltp.pruning.shrinking.shrink import shrink
from effnn.ltp.pruning.tune import LayerTuning, tune_masks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage: its name, seconds, share of the dense MACs, kept units layer by layer, and held-out loss.

    loss: mean loss a label on the held-out calibration rows under this stage's masks, None where nothing is held out.
    latency_ms: predicted from the table, with a latency target only.
    """

    name: str
    seconds: float
    mac_ratio: float
    heads_per_layer: list[int]
    filters_per_layer: list[int]
    loss: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class LatencyCheck:
    """Milliseconds of one forward pass: predicted by the latency table, and measured on the assembled models.

    ratio: measured pruned over dense, median over the rounds in which the two took turns; what the budget is held
    against. attempts: what the search planned, and measured in order to correct itself (`latency_plan`), shares of the
    dense latency; empty with corrections=0. All are measured anew in the end.
    """

    dense_predicted: float
    dense_measured: float
    predicted: float
    measured: float
    ratio: float
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class PruneReport:
    """What was done, stage by stage and layer by layer.

    calibration_loss: mean over mini-batches, dense model. chance_loss: a constant prediction's, None where it is not
    known (always with a loss of one's own). dense_loss: the dense model's on the held-out rows. tuning_accepted:
    False if the held-out loss rose and the scales were dropped. latency: with a latency target, ms of the dense and of
    the pruned model, predicted by the table and measured at the end, the two models in turn (median), and how the
    search corrected itself. peak_bytes: memory above the level at the call (GPU: allocator; CPU: resident set), None if
    not measured.
    """

    target: Macs | Latency
    rows: int
    seq_len: float
    calibration_loss: float
    chance_loss: float | None
    dense_loss: float | None
    stages: list[Stage]
    layers: list[LayerTuning] = field(default_factory=list)
    tuning_accepted: bool | None = None
    latency: LatencyCheck | None = None
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds of all stages together; the held-out losses are counted in the stage that they judge."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def accepted_layers(self) -> int:
        """Layer halves whose scales were accepted."""
        return sum(layer.accepted for layer in self.layers)

    def to_dict(self) -> dict:
        """The report as plain values, ready for JSON (what was not found is None) or a table."""
        target = {"kind": type(self.target).__name__, **asdict(self.target)}
        return _plain(asdict(self) | {"target": target})


@dataclass(frozen=True)
class PruneResult:
    """masks: what to apply. stages: the masks after "search", "rearrange" and "tune", as far as these ran."""

    model: PreTrainedModel
    masks: Masks
    stages: dict[str, Masks]
    report: PruneReport

    def materialize(self) -> PreTrainedModel:
        """The smaller dense model: same outputs as the masked one; saves and loads by itself."""
        return shrink(self.model, self.masks)

    def export_padded(self, directory: str | Path, tokenizer=None) -> Path:
        """Write a zero-filled checkpoint of the dense class, for stock loaders: right outputs, no speed-up."""
        return export_padded(self.model, self.masks, directory, tokenizer=tokenizer)


def prune(
    model: PreTrainedModel,
    calibration_loader: Iterable[Mapping[str, Tensor]],
    target: Macs | Latency,
    *,
    fisher: str = "batch",
    labels: str = "data",
    loss: Loss | None = None,
    rearrange: bool = True,
    tune: bool = True,
    solver: str = "ridge",
    holdout: float = 0.1,
    round_to: int = 1,
    table: LatencyTable | None = None,
    autocast: torch.dtype | None = None,
    offload: torch.dtype | None = None,
    measure_memory: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> PruneResult:
    """Prune a fine-tuned encoder to a budget without retraining; returns a `PruneResult`, `model` stays as it is.

    model: BERT, RoBERTa, DistilBERT, ELECTRA or ViT with its task head, in eval mode, on any device; with `loss` also
    without a head.
    calibration_loader: mini-batches of model inputs with labels; the paper draws 2048 training rows with replacement.
    Read once, in its own order. target: `Macs(0.6)` or `Latency(0.6, batch=..., seq_len=...)`.
    fisher: "batch" squares gradients of mini-batch means (the paper's code), "sample" those of single rows.
    labels: "data", or "model" to draw them from the model itself. loss: loss(model, batch) instead of the model's own,
    see `calibrate`. holdout: share of the rows that tuning is judged on
    instead of fitted to. round_to: kept filters of a layer are a multiple of it. table: a measured `LatencyTable` to
    use again. autocast: torch.bfloat16 runs the forward passes in it. offload: hidden states of the calibration
    rows wait on the CPU in this dtype, for a GPU too small to hold them (torch.float32, or torch.bfloat16 at half the
    memory). seed: of labels="model" only.

    Raises InvalidInput for: an unsupported architecture, a model in training mode or one that could not be made smaller
    in the end (all before a batch is read), a first batch that the model has no loss on (before any pass over the
    others), an empty loader, a loss that is not finite, a budget that nothing fits. Warns when the calibration loss is
    near that of a constant.
    Source: ltp.md A.2 to A.6.
    """
    if not isinstance(target, (Macs, Latency)):
        raise InvalidInput(f"target={target!r}: expected effnn.ltp.Macs(ratio) or effnn.ltp.Latency(ratio, ...)")
    check_model(model, labels, loss)
    shape = Shape.of(model, adapter_for(model))
    small = rebuilt(model)
    batches = _length(calibration_loader)
    first, calibration_loader = checked_batches(model, calibration_loader, labels, loss)
    check_rebuilt(model, small, first, loss)
    del small, first
    if isinstance(target, Latency):
        # before the calibration, so that a device that is not here is found at once
        table = table or LatencyTable.measure(model, target, progress=progress)
        table.check(target, model)
    memory = PeakMemory(next(model.parameters()).device)
    total = None if batches is None else batches + 2 * shape.layers * tune
    with (
        memory if measure_memory else nullcontext(),
        tqdm(total=total, desc="calibrate", unit="step", disable=not progress, leave=False) as bar,
    ):
        clock = _Clock()
        calibration = calibrate(
            model,
            calibration_loader,
            fisher=fisher,
            labels=labels,
            loss=loss,
            holdout=holdout if tune else 0.0,
            keep_inputs=tune,
            autocast=autocast,
            offload=offload,
            generator=torch.Generator().manual_seed(seed),
            on_batch=bar.update,
        )
        budget = _Budget(shape, target, calibration, table, round_to)

        def held(masks: Masks) -> float | None:
            if not calibration.held_out:
                return None
            return held_out_loss(shrink(model, masks, share=True), calibration.held_out, loss)

        dense_loss = dense_held_out_loss(model, calibration.held_out, loss)
        stages = [_stage("calibrate", clock, budget, Masks.ones(shape), dense_loss)]

        bar.set_description("search")
        plan = budget.plan(model, target)
        kept = {"search": plan.masks}
        teacher = budget.search(plan.target.relaxed()) if tune else None
        held_loss = held(kept["search"])
        stages.append(_stage("search", clock, budget, kept["search"], held_loss))

        if rearrange:
            bar.set_description("rearrange")
            searched = kept["search"]
            kept["rearrange"] = Masks(
                rearrange_mask(calibration.head_gradients, searched.heads),
                rearrange_mask(calibration.filter_gradients, searched.filters),
            )
            held_loss = held(kept["rearrange"])
            stages.append(_stage("rearrange", clock, budget, kept["rearrange"], held_loss))

        layers, accepted = [], None
        if tune:
            bar.set_description("tune")
            before = list(kept.values())[-1]
            tuned, layers = tune_masks(
                model,
                calibration.inputs,
                before,
                teacher,
                solver=solver,
                autocast=autocast,
                offload=offload,
                on_step=bar.update,
            )
            tuned_loss = held(tuned)
            accepted = tuned_loss is None or tuned_loss <= held_loss
            if not accepted:
                log.warning(
                    "tuned scales raise the held-out loss from %.4f to %.4f and are dropped", held_loss, tuned_loss
                )
            kept["tune"] = tuned if accepted else before
            stages.append(_stage("tune", clock, budget, kept["tune"], tuned_loss if accepted else held_loss))
    masks = list(kept.values())[-1]
    report = PruneReport(
        target=target,
        rows=calibration.rows,
        seq_len=budget.cost.seq_len,
        calibration_loss=calibration.loss,
        chance_loss=calibration.chance_loss,
        dense_loss=dense_loss,
        stages=stages,
        layers=layers,
        tuning_accepted=accepted,
        latency=_check_latency(model, masks, plan, table) if isinstance(target, Latency) else None,
        peak_bytes=memory.peak_bytes,
    )
    return PruneResult(model, masks, kept, report)


class _Budget:
    """Search and bookkeeping under one kind of target."""

    def __init__(self, shape: Shape, target, calibration: Calibration, table: LatencyTable | None, round_to: int):
        given = isinstance(target, Macs) and target.seq_len != "auto"
        self.cost = MacCost(shape, float(target.seq_len if given else calibration.mean_length))
        self.calibration, self.round_to = calibration, round_to
        self.table = table if isinstance(target, Latency) else None

    def plan(self, model: PreTrainedModel, target: Macs | Latency) -> Plan:
        """Masks within the budget, and the target that the search was given in the end."""
        if self.table is None:
            return Plan(self.search(target), target, ())
        importance = self.calibration.head_importance, self.calibration.filter_importance
        return plan_latency(model, *importance, self.table, target, self.round_to)

    def search(self, target: Macs | Latency) -> Masks:
        importance = self.calibration.head_importance, self.calibration.filter_importance
        if self.table is None:
            return search_macs(*importance, self.cost, target, self.round_to)
        return search_latency(*importance, self.table, target, self.round_to)


class _Clock:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def read(self) -> float:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds


def _stage(name: str, clock: _Clock, budget: _Budget, masks: Masks, loss: float | None) -> Stage:
    latency = budget.table.predict(masks) if budget.table else None
    ratio = budget.cost.ratio(masks)
    return Stage(name, clock.read(), ratio, masks.heads_per_layer, masks.filters_per_layer, loss, latency)


def _check_latency(model: PreTrainedModel, masks: Masks, plan: Plan, table: LatencyTable) -> LatencyCheck:
    times = measure_pair(model, masks, plan.target)
    return LatencyCheck(
        dense_predicted=table.predict(Masks.ones(Shape.of(model))),
        dense_measured=1e3 * times["dense"].median,
        predicted=table.predict(masks),
        measured=1e3 * times["pruned"].median,
        ratio=measured_ratio(times),
        attempts=plan.attempts,
    )


def _length(loader: Iterable) -> int | None:
    """Number of mini-batches, None where the loader does not know it."""
    try:
        return len(loader)
    except TypeError:
        return None


def _plain(value: object) -> object:
    """Numbers, texts, lists and dicts only; NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
