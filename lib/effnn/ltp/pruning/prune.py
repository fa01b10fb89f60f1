"""Post-training pruning in one call (Kwon et al. 2022; the talk's LTP pipeline): no retraining, one pass over the rows.

  1. calibrate    one forward and backward over the calibration rows: Fisher information of every mask entry;
  2. search       the best masks within the MAC or latency budget, by the diagonal Fisher (section 4.1);
  3. rearrange    better sets of the same sizes, by the block-diagonal Fisher (section 4.2);
  4. tune         real-valued scales that reconstruct a less pruned teacher, layer by layer (section 4.3).

The model is not changed. `PruneResult.materialize()` gives the smaller model. Not covered: decoders, embeddings, and
any further training.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from types import NoneType

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from effnn.base import InvalidInput, PeakMemory
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.calibration.batch_checks import checked_loader
from effnn.ltp.pruning.calibration.calibrate import Calibration, calibrate
from effnn.ltp.pruning.calibration.held_out import dense_held_out_loss, held_out_loss
from effnn.ltp.pruning.calibration.losses import Loss
from effnn.ltp.pruning.calibration.model_checks import check_model, check_rebuilt, rebuilt
from effnn.ltp.pruning.latency.measured_search import SearchResult, measure_pair, measured_ratio, search_measured
from effnn.ltp.pruning.latency.search import check_reachable, search_latency
from effnn.ltp.pruning.latency.table import Latency, LatencyTable
from effnn.ltp.pruning.macs import MacCost, Macs, search_macs, spare_macs
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.options import check_calibration, check_count, check_tuning
from effnn.ltp.pruning.ranking import check_chunks
from effnn.ltp.pruning.rearrange import rearrange as rearrange_mask
from effnn.ltp.pruning.report import LatencyCheck, PruneReport, PruneResult, Stage
from effnn.ltp.pruning.shrinking.shrink import shrink
from effnn.ltp.pruning.tune import judged, tune_masks

log = logging.getLogger(__name__)


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
    calibration_loader: mini-batches of model inputs with labels, read once, in their own order; the paper draws 2048
        training rows with replacement.
    target: `Macs(0.6)` or `Latency(0.6, batch=..., seq_len=...)`.
    fisher: "batch" squares gradients of mini-batch means (the paper's code), "sample" those of single rows.
    labels: "data", or "model" to draw them from the model itself.
    loss: loss(model, batch) instead of the model's own, see `calibrate`.
    rearrange: whether to run step 3.
    tune: whether to run step 4.
    solver: of step 4, "ridge" or "lsmr", see `NormalEquations.solve`.
    holdout: share of the rows that tuning is judged on instead of fitted to.
    round_to: kept filters of a layer are a multiple of it.
    table: a `LatencyTable` that was measured before; otherwise one is measured for a target in latency.
    autocast: torch.bfloat16 runs the forward passes in it.
    offload: hidden states of the calibration rows wait on the CPU in this dtype, for a GPU too small to hold them
        (torch.float32, or torch.bfloat16 at half the memory).
    measure_memory: whether to fill in `report.peak_bytes`.
    progress: whether to show progress bars.
    seed: of labels="model" only.

    Raises InvalidInput for: an option out of its range, an unsupported architecture, a model in training mode or one
    that could not be made smaller in the end (all before a batch is read), a first batch that the model has no loss on
    (before any pass over the others), an empty loader, a loss that is not finite, a budget that nothing fits (as soon
    as what it costs is known: before a batch is read, with a given table or `seq_len`). Warns when the calibration loss
    is near that of a constant prediction.
    """
    if not isinstance(target, (Macs, Latency)):
        raise InvalidInput(f"target={target!r}: expected effnn.ltp.Macs(ratio) or effnn.ltp.Latency(ratio, ...)")
    if not isinstance(table, (LatencyTable, NoneType)):
        raise InvalidInput(f"table={table!r}: expected None or an effnn.ltp.LatencyTable")
    check_calibration(fisher, holdout, autocast, offload)
    check_tuning(solver, autocast, offload)
    check_count("seed", seed, -(2**63), 2**63 - 1)
    check_model(model, labels, loss)
    shape = Shape.of(model, adapter_for(model))
    check_chunks("heads", shape.heads, 1, target.min_heads)
    check_chunks("filters", shape.filters, round_to, target.min_filters)
    if isinstance(target, Latency) and table is not None:
        _check_table(table, target, model, round_to)
    elif isinstance(target, Macs) and target.seq_len != "auto":
        spare_macs(MacCost(shape, target.seq_len), target, round_to)
    small = rebuilt(model)
    batches = _length(calibration_loader)
    first, calibration_loader = checked_loader(model, calibration_loader, labels, loss)
    check_rebuilt(model, small, first, loss)
    del small, first
    if isinstance(target, Latency) and table is None:
        # before the calibration, so that a device that is not here or a budget out of reach is found at once
        table = LatencyTable.measure(model, target, progress=progress)
        _check_table(table, target, model, round_to)
    memory = PeakMemory(next(model.parameters()).device)
    steps = None if batches is None else batches + 2 * shape.layers * tune
    with (
        memory if measure_memory else nullcontext(),
        tqdm(total=steps, desc="calibrate", unit="step", disable=not progress, leave=False) as bar,
    ):
        clock = _Stopwatch()

        # 1. gradients of all masks, what enters the first layer, and the held-out rows
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

        def loss_under(masks: Masks) -> float | None:
            if not calibration.held_out:
                return None
            return held_out_loss(shrink(model, masks, share=True), calibration.held_out, loss)

        dense_loss = dense_held_out_loss(model, calibration.held_out, loss)
        stages = [budget.stage("calibrate", Masks.ones(shape), dense_loss, clock.read())]

        # 2. the student's masks within the budget, and the teacher's within its square root
        bar.set_description("search")
        searched = budget.search_for(model, target)
        teacher = budget.search(searched.target.relaxed()) if tune else None
        masks, pruned_loss = searched.masks, loss_under(searched.masks)
        kept = {"search": masks}
        stages.append(budget.stage("search", masks, pruned_loss, clock.read()))

        # 3. exchanges within each layer
        if rearrange:
            bar.set_description("rearrange")
            masks = kept["rearrange"] = Masks(
                rearrange_mask(calibration.head_gradients, masks.heads),
                rearrange_mask(calibration.filter_gradients, masks.filters),
            )
            pruned_loss = loss_under(masks)
            stages.append(budget.stage("rearrange", masks, pruned_loss, clock.read()))

        # 4. scales, unless they raise the held-out loss
        layers, accepted, judgement = [], None, ""
        if tune:
            bar.set_description("tune")
            tuned, layers = tune_masks(
                model,
                calibration.inputs,
                masks,
                teacher,
                solver=solver,
                autocast=autocast,
                offload=offload,
                on_step=bar.update,
            )
            tuned_loss = loss_under(tuned)
            accepted, judgement = judged(pruned_loss, tuned_loss)
            if judgement:
                log.warning(judgement)
            if accepted:
                masks, pruned_loss = tuned, tuned_loss
            kept["tune"] = masks
            stages.append(budget.stage("tune", masks, pruned_loss, clock.read()))
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
        tuning_reason=judgement,
        latency=_check_latency(model, masks, searched, table) if isinstance(target, Latency) else None,
        peak_bytes=memory.peak_bytes,
    )
    return PruneResult(model, masks, kept, report)


class _Budget:
    """The mask search under one kind of target, and what masks cost by it."""

    def __init__(self, shape: Shape, target, calibration: Calibration, table: LatencyTable | None, round_to: int):
        given = isinstance(target, Macs) and target.seq_len != "auto"
        self.cost = MacCost(shape, float(target.seq_len if given else calibration.mean_length))
        self.importance = calibration.head_importance, calibration.filter_importance
        self.table, self.round_to = table if isinstance(target, Latency) else None, round_to
        if self.table is None:
            spare_macs(self.cost, target, round_to)

    def search_for(self, model: PreTrainedModel, target: Macs | Latency) -> SearchResult:
        """Masks of which `model` keeps the budget: counted in MACs, or measured."""
        if self.table is None:
            return SearchResult(self.search(target), target, ())
        return search_measured(model, *self.importance, self.table, target, self.round_to)

    def search(self, target: Macs | Latency) -> Masks:
        """Masks within the budget by MACs, or by the table."""
        if self.table is None:
            return search_macs(*self.importance, self.cost, target, self.round_to)
        return search_latency(*self.importance, self.table, target, self.round_to)

    def stage(self, name: str, masks: Masks, loss: float | None, seconds: float) -> Stage:
        """What the report says of a stage that ended with `masks`."""
        latency = self.table.predict(masks) if self.table else None
        ratio = self.cost.ratio(masks)
        return Stage(name, seconds, ratio, masks.heads_per_layer, masks.filters_per_layer, loss, latency)


class _Stopwatch:
    """Seconds since it was read last."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def read(self) -> float:
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds


def _check_latency(model: PreTrainedModel, masks: Masks, searched: SearchResult, table: LatencyTable) -> LatencyCheck:
    times = measure_pair(model, masks, searched.target)
    return LatencyCheck(
        dense_predicted=table.predict(Masks.ones(Shape.of(model))),
        dense_measured=1e3 * times["dense"].median,
        predicted=table.predict(masks),
        measured=1e3 * times["pruned"].median,
        ratio=measured_ratio(times),
        attempts=searched.attempts,
    )


def _check_table(table: LatencyTable, target: Latency, model: PreTrainedModel, round_to: int) -> None:
    table.check(target, model)
    check_reachable(table, target, Shape.of(model).layers, round_to)


def _length(loader: Iterable) -> int | None:
    """Number of mini-batches, None where the loader does not know it."""
    try:
        return len(loader)
    except TypeError:
        return None
