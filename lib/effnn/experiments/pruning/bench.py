"""Benchmarks of post-training pruning; what each key means stands in data/bench.csv.

The time of pruning depends on shapes, not on what the weights are: models are BERT-base-shaped and random, and so are
the rows.
"""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from effnn import ltp, paths
from effnn.base import PeakMemory, Timing, interleave, seed_everything, threads
from effnn.experiments.shared.measured import Measured
from effnn.experiments.shared.pool import cores

ROUNDS = 5
LONG_ROUNDS = 3  # of what takes minutes per round; its warm-up is one mini-batch
ROWS, LENGTH, BATCH = 256, 128, 32


def prune_over_training_pass() -> Measured:
    """The whole pruning to half the MACs over one training pass on the same rows; and its peak memory."""
    model, batches = _bert_base(), _rows(ROWS)

    def training_pass(rows: list[dict[str, Tensor]] = batches) -> None:
        for batch in rows:
            model(**batch).loss.backward()
            model.zero_grad()

    def prune(rows: list[dict[str, Tensor]] = batches) -> ltp.PruneResult:
        return ltp.prune(model, rows, ltp.Macs(0.5), progress=False)

    logging.getLogger("effnn.ltp").setLevel(logging.ERROR)  # random weights: of course they were not fine-tuned
    with threads(cores()):
        prune(batches[:1]), training_pass(batches[:1])
        times = interleave({"prune": prune, "training pass": training_pass}, rounds=LONG_ROUNDS, warmup=0)
        memory = peak_memory(model, batches)
        used = torch.get_num_threads()
    return _ratio(times["prune"], times["training pass"], used, details=memory)


def peak_memory(model: BertForSequenceClassification, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Peak memory of a pruning, the model included, and the parts of the bound that it must not exceed; in bytes.

    bound = 1.1 * (model + hidden states of all rows entering one layer, teacher and student + activations of a batch);
    the activations are measured as what a calibration of one batch takes above the model.
    """
    with PeakMemory() as one_batch:
        ltp.calibrate(model, batches[:1], keep_inputs=False)
    result = ltp.prune(model, batches, ltp.Macs(0.5), progress=False, measure_memory=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = 2 * sum(batch["input_ids"].numel() for batch in batches) * model.config.hidden_size * 4
    if one_batch.peak_bytes is None or result.report.peak_bytes is None:
        return {"model_bytes": weights, "states_bytes": states}
    bound = 1.1 * (weights + states + one_batch.peak_bytes)
    peak = weights + result.report.peak_bytes
    return {
        "peak_bytes": peak,
        "bound_bytes": bound,
        "peak_over_bound": peak / bound,
        "model_bytes": weights,
        "states_bytes": states,
        "one_batch_bytes": one_batch.peak_bytes,
    }


def rearrange_speedup() -> Measured:
    """The plain greedy, layer by layer, over ours on the filters of a BERT-base; the masks must be equal."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(64, 12, 3072, generator=generator) * torch.rand(12, 3072, generator=generator)
    importance = gradients.square().sum(0)
    mask = (importance > importance.median(dim=1, keepdim=True).values).float()
    plain = _plain_ltp()
    if not torch.equal(plain.rearrange(gradients, mask), ltp.rearrange(gradients, mask)):
        raise RuntimeError(
            "the plain and the fast rearrangement give different masks: the comparison would mean nothing"
        )
    with threads(1):
        times = interleave(
            {"plain": lambda: plain.rearrange(gradients, mask), "ours": lambda: ltp.rearrange(gradients, mask)},
            rounds=ROUNDS,
        )
    return _ratio(times["plain"], times["ours"], 1, note="equal masks")


def shrunk_over_dense() -> Measured:
    """Latency of the model shrunk to half the MACs over the dense one's; batch 8, length 128."""
    model = _bert_base()
    logging.getLogger("effnn.ltp").setLevel(logging.ERROR)
    result = ltp.prune(model, _rows(BATCH), ltp.Macs(0.5), tune=False, progress=False)
    small, inputs = result.materialize(), {k: v for k, v in _rows(8)[0].items() if k != "labels"}

    def forward(network: torch.nn.Module):
        def ten_times() -> None:
            with torch.no_grad():
                for _ in range(10):
                    network(**inputs)

        return ten_times

    with threads(cores()):
        times = interleave({"shrunk": forward(small), "dense": forward(model)}, rounds=ROUNDS)
        used = torch.get_num_threads()
    return _ratio(times["shrunk"], times["dense"], used, note="ten forwards a run")


BENCHMARKS = {
    "ltp.prune_over_training_pass": prune_over_training_pass,
    "ltp.rearrange_speedup": rearrange_speedup,
    "ltp.shrunk_over_dense": shrunk_over_dense,
}


def _ratio(
    above: Timing, below: Timing, used: int, note: str = "", details: dict[str, float] | None = None
) -> Measured:
    seconds = {above.name: above.seconds, below.name: below.seconds}
    return Measured(above.over(below), above.load, seconds, used, note, details or {})


@cache
def _bert_base() -> BertForSequenceClassification:
    seed_everything(0)
    return BertForSequenceClassification(BertConfig(num_labels=2)).eval()


def _rows(count: int) -> list[dict[str, Tensor]]:
    """Mini-batches of random rows of full length."""
    generator = torch.Generator().manual_seed(0)
    size = min(BATCH, count)
    return [
        {
            "input_ids": torch.randint(1000, 30000, (size, LENGTH), generator=generator),
            "attention_mask": torch.ones(size, LENGTH, dtype=torch.long),
            "labels": torch.randint(0, 2, (size,), generator=generator),
        }
        for _ in range(count // size)
    ]


def _plain_ltp():
    """The plain versions that the tests hold ours against, loaded from lib/tests."""
    spec = importlib.util.spec_from_file_location("plain_ltp", paths.TESTS / "plain" / "ltp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
