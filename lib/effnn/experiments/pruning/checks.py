"""Checks of notebook 01: a smaller model computes what the masked one does, and every budget is kept."""

import tempfile

import numpy as np
import pandas as pd
import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from effnn import ltp
from effnn.data.text.task import TextTask
from effnn.experiments.pruning.runs import Sweep
from effnn.experiments.shared.classifier import TrainedClassifier


def check_identity(task: TextTask, trained: TrainedClassifier, masks: ltp.Masks, rows: int = 256) -> dict[str, float]:
    """Largest absolute logit differences on dev rows: masked - shrunk, loaded from disk - shrunk, masked - dense."""
    split = trained.encode(task.dev.take(range(min(rows, len(task.dev)))))
    small = ltp.shrink(trained.model, masks)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = ltp.load_pruned(folder).eval().to(trained.model.device)
    enable_progress_bar()
    largest = {"masked_shrunk": 0.0, "loaded_shrunk": 0.0, "masked_dense": 0.0}
    with torch.no_grad():
        for batch in split.batches(64):
            batch = {name: value.to(trained.model.device) for name, value in batch.items()}
            with ltp.masked(trained.model, masks):
                masked = trained.model(**batch).logits
            shrunk, reloaded, dense = (m(**batch).logits for m in (small, loaded, trained.model))
            pairs = {
                "masked_shrunk": (masked, shrunk),
                "loaded_shrunk": (reloaded, shrunk),
                "masked_dense": (masked, dense),
            }
            for name, (a, b) in pairs.items():
                largest[name] = max(largest[name], float((a - b).abs().max()))
    return largest


def check_budgets(task: TextTask, trained: TrainedClassifier, sweep: Sweep, table: ltp.LatencyTable) -> pd.DataFrame:
    """Budgets 0.05 to 0.95 by MACs (exact count) and by latency (predicted by `table`): asked, reached, kept or not.

    A latency budget below what is left with the cheapest blocks cannot be met: only there a refusal is right. The rows
    of kind "latency" rest on a measured table: they are shown, nothing is claimed of them.
    """
    rows = trained.calibration(task, min(sweep.rows, 256), sweep.batch, 0)
    found = ltp.calibrate(trained.model, rows, keep_inputs=False)
    cost = ltp.MacCost(ltp.Shape.of(trained.model), found.mean_length)
    importance = found.head_importance, found.filter_importance
    dense_ms = table.predict(ltp.Masks.ones(cost.shape))
    floor_ms = table.rest_ms + cost.shape.layers * (min(table.head_ms) + min(table.filter_ms))
    listed = []
    for ratio in (round(0.05 * step, 2) for step in range(1, 20)):
        reached = cost.ratio(ltp.search_macs(*importance, cost, ltp.Macs(ratio)))
        listed.append({"budget": ratio, "kind": "macs", "reached": reached, "kept": reached <= ratio, "refused": False})
        target = ltp.Latency(ratio, batch=table.batch, seq_len=table.seq_len)
        try:
            reached = table.predict(ltp.search_latency(*importance, table, target)) / dense_ms
        except ltp.BudgetTooSmall:
            right = ratio * dense_ms < floor_ms
            listed.append({"budget": ratio, "kind": "latency", "reached": np.nan, "kept": right, "refused": True})
            continue
        kept = reached <= ratio * (1 + 1e-9)
        listed.append({"budget": ratio, "kind": "latency", "reached": reached, "kept": kept, "refused": False})
    return pd.DataFrame(listed)
