"""Latency of an encoder's attention and FFN blocks at reduced widths (ltp.md A.4).

How it is measured. Each pass is a small encoder of the model's own layer class: as many layers as the model has, each
cut to some number of heads and of filters, fed with what the model's first layer really receives (hidden states,
attention mask, dtype, device). A mark in time is taken when a layer begins, when its attention block ends (after the
normalisation that follows attention, or before the one that precedes the FFN) and when the layer ends.

Why so. Residual sums and normalisations are in, and nothing has to be subtracted: whole layers at (n heads, F / 2
filters) minus others would add the noise of two runs, and a block alone in a loop would find its weights in the cache.
Here each block finds the caches as its predecessor left them, as when deployed, and on a GPU nothing waits between
blocks (the marks are events in the stream). Every round draws new passes, so that a width meets other partners and
positions, and covers all widths and the dense model, so that a drifting machine treats all alike. A block without
heads or filters runs what is left of it: a bias, the residual sum, the normalisations.
"""

import copy
import itertools
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from effnn.ltp.adapters import Adapter, adapter_for
from effnn.ltp.cut import cut
from effnn.ltp.latency_measure import evaluating, random_inputs
from effnn.ltp.masks import Shape


@dataclass(frozen=True)
class BlockTimes:
    """Median ms. heads, filters: number kept -> block; dense_ms: dense model; rest_ms: what its layers do not take."""

    heads: dict[int, float]
    filters: dict[int, float]
    rest_ms: float
    dense_ms: float


def measure_blocks(
    model: PreTrainedModel, batch: int, seq_len: int, grid: int, repeats: int, progress: bool = True
) -> BlockTimes:
    """Time the attention block for every number of heads and the FFN block for filters at 0, 1, multiples of `grid`, F.

    The model stays as it is; it is timed on the device and in the dtype it has, in evaluation mode.
    """
    adapter = adapter_for(model)
    shape = Shape.of(model, adapter)
    heads: dict[int, list[float]] = {count: [] for count in range(shape.heads + 1)}
    filters: dict[int, list[float]] = {
        count: [] for count in sorted({0, 1, *range(grid, shape.filters, grid), shape.filters})
    }
    rest, whole = [], []
    order = random.Random(0)
    clock = _Clock(model.device)
    layers = adapter.layers(model)
    passes = math.ceil(max(len(heads), len(filters)) / shape.layers)  # so that a round takes every width at least once
    with evaluating(model), torch.cuda.device(model.device if clock.on_gpu else -1):
        inputs = itertools.cycle(random_inputs(model, batch, seq_len))
        received = _received_by(layers[0], model, next(inputs))
        steps = tqdm(total=(repeats + 1) * passes, desc="latency table", leave=False, delay=3, disable=not progress)
        for round_index in range(repeats + 1):
            counted = round_index > 0  # the first round warms up
            head_counts = _spread(list(heads), passes * shape.layers, order)
            filter_counts = _spread(list(filters), passes * shape.layers, order)
            for start in range(0, passes * shape.layers, shape.layers):
                widths = head_counts[start : start + shape.layers], filter_counts[start : start + shape.layers]
                times = _run(_cut_layers(model, adapter, *widths, clock), received, clock)
                if counted:
                    for n, m, (attention_ms, ffn_ms) in zip(*widths, times, strict=True):
                        heads[n].append(attention_ms)
                        filters[m].append(ffn_ms)
                steps.update()
            total, inside = _run_dense(model, layers, next(inputs), clock)
            if counted:
                rest.append(max(total - inside, 0.0))
                whole.append(total)
        steps.close()
    return BlockTimes(_medians(heads), _medians(filters), statistics.median(rest), statistics.median(whole))


class _Clock:
    """Marks in time on the device's own clock: events in the stream on a GPU, so that nothing waits for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def mark(self) -> object:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def ms(self, start: object, end: object) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)


class _Timed:
    """A layer that marks its beginning, the end of its attention block, and its end."""

    def __init__(self, layer: nn.Module, adapter: Adapter, clock: _Clock):
        self.layer, self.clock = layer, clock
        self.begin = self.middle = self.end = None
        parts = adapter.parts(layer)
        if parts.norm_after_attention is not None:
            parts.norm_after_attention.register_forward_hook(self._boundary)
        else:
            (parts.norm_before_ffn or parts.fc1).register_forward_pre_hook(self._boundary)

    def _boundary(self, *_: object) -> None:
        self.middle = self.clock.mark()

    def __call__(self, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        self.begin = self.clock.mark()
        output = self.layer(hidden, *args, **kwargs)
        self.end = self.clock.mark()
        return output[0] if isinstance(output, tuple) else output

    def times(self) -> tuple[float, float]:
        """Ms of the attention block and of the FFN block."""
        return self.clock.ms(self.begin, self.middle), self.clock.ms(self.middle, self.end)


def _cut_layers(
    model: PreTrainedModel, adapter: Adapter, heads: list[int], filters: list[int], clock: _Clock
) -> list[_Timed]:
    """Copies of the model's layers, each cut to its first heads and filters: which ones does not matter to time."""
    small = copy.deepcopy(model)
    layers = [_Timed(layer, adapter, clock) for layer in adapter.layers(small)]
    cut(small, adapter, [list(range(n)) for n in heads], [list(range(m)) for m in filters])
    return layers


def _received_by(layer: nn.Module, model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple, dict]:
    """What `layer` is called with when `model` runs: hidden states, other arguments, keyword arguments."""
    calls = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        handle.remove()
    (hidden, *args), kwargs = calls[0]
    return hidden, tuple(args), kwargs


def _run(layers: list[_Timed], received: tuple[Tensor, tuple, dict], clock: _Clock) -> list[tuple[float, float]]:
    hidden, args, kwargs = received
    clock.wait()
    with torch.inference_mode():
        for layer in layers:
            hidden = layer(hidden, args, kwargs)
    clock.wait()
    return [layer.times() for layer in layers]


def _run_dense(
    model: PreTrainedModel, layers: Sequence[nn.Module], inputs: dict[str, Tensor], clock: _Clock
) -> tuple[float, float]:
    """Ms of the dense model, and of those the ms from the first layer's beginning to the last one's end."""
    marks = []
    handles = [
        layers[0].register_forward_pre_hook(lambda *_: marks.append(clock.mark())),
        layers[-1].register_forward_hook(lambda *_: marks.append(clock.mark())),
    ]
    try:
        clock.wait()
        begin = clock.mark()
        with torch.inference_mode():
            model(**inputs)
        end = clock.mark()
        clock.wait()
    finally:
        for handle in handles:
            handle.remove()
    return clock.ms(begin, end), clock.ms(*marks)


def _spread(counts: list[int], size: int, order: random.Random) -> list[int]:
    """`size` counts in random order, each as often as the others to within one."""
    chosen = counts * (size // len(counts)) + order.sample(counts, size % len(counts))
    order.shuffle(chosen)
    return chosen


def _medians(samples: dict[int, list[float]]) -> dict[int, float]:
    return {count: statistics.median(values) for count, values in samples.items()}
