"""Latency of an encoder's attention and FFN blocks at reduced widths.

How it is measured. Each pass is one forward of a whole model of the user's own class: as many layers as the model has,
each cut to some number of heads and of filters. The time is read when a layer begins, when its attention block ends
(after the normalisation that follows attention, or before the one that precedes the FFN) and when the layer ends; what
is outside the layers (embeddings, masks, pooler, head) is the rest. Residual sums and normalisations are in.

Why. The table predicts assembled models, so assembled models are what runs: blocks find the caches and the allocator as
the blocks before them leave these, nothing has to be subtracted, and the parts add up to the measured forward pass. On
a GPU nothing waits between blocks (the marks are events in the stream). A block without heads or filters runs what is
left of it: a bias, the residual sum, the normalisations.

A noisy machine. Every round draws new passes, so that a width meets other partners and positions, takes every width at
least once, and runs the dense model in turn with them. Times count as shares of the dense model's in the same round, so
that drift hits all alike; medians over the rounds ignore what happens once. The dense runs give the full widths, too,
so that the table's dense model is the one that ratios refer to. Nothing here relies on times that rise or are positive.
"""

import copy
import itertools
import math
import random
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from effnn.base import evaluating
from effnn.ltp.pruning.adapters import Adapter, adapter_for
from effnn.ltp.pruning.latency.measure import random_inputs
from effnn.ltp.pruning.masks import Shape
from effnn.ltp.pruning.shrinking.cut import cut

PASSES_PER_DENSE_RUN = 3
"""Passes of cut models between two runs of the dense one; each round has two dense runs at least."""

BETWEEN = 12
"""About how many numbers of filters between multiples of the grid are measured."""


@dataclass(frozen=True)
class BlockTimes:
    """Median ms: of a block by the heads or filters it keeps, outside the layers, and of the dense model."""

    heads: dict[int, float]
    filters: dict[int, float]
    rest_ms: float
    dense_ms: float


@dataclass(frozen=True)
class PassTimes:
    """Ms of one forward pass: in all, and the attention and FFN block of every layer."""

    total: float
    blocks: list[tuple[float, float]]

    @property
    def rest(self) -> float:
        """What the layers do not take."""
        return self.total - math.fsum(itertools.chain(*self.blocks))


def measure_blocks(
    model: PreTrainedModel, batch: int, seq_len: int, grid: int, repeats: int, progress: bool = True
) -> BlockTimes:
    """Median ms of the attention block by its heads, and of the FFN block by its filters.

    model: stays as it is; it is timed on the device and in the dtype it has, in evaluation mode.
    batch: rows of an input.
    seq_len: tokens per row.
    grid: FFN blocks are timed at its multiples and at some numbers between (`measured_filters`).
    repeats: rounds that count; one more warms up.
    progress: whether to show a progress bar.
    """
    adapter = adapter_for(model)
    shape = Shape.of(model, adapter)
    heads = list(range(shape.heads + 1))
    filters = measured_filters(shape.filters, grid)
    passes = math.ceil(max(len(heads), len(filters)) / shape.layers)  # so that a round takes every width at least once
    dense_runs = max(2, math.ceil(passes / PASSES_PER_DENSE_RUN))
    full = [shape.heads] * shape.layers, [shape.filters] * shape.layers
    shares = _Shares(heads, filters)
    order = random.Random(0)
    clock = _Clock(model.device)
    with evaluating(model), torch.cuda.device(model.device if clock.on_gpu else -1):
        inputs = itertools.cycle(random_inputs(model, batch, seq_len))
        dense = _MarkedModel(model, adapter, *full, clock)
        steps = tqdm(
            total=(repeats + 1) * (passes + dense_runs),
            desc="latency table",
            leave=False,
            delay=3,
            disable=not progress,
        )
        for round_index in range(repeats + 1):
            some_heads = _spread(heads, passes * shape.layers, order)
            some_filters = _spread(filters, passes * shape.layers, order)
            done: list[tuple[list[int], list[int], PassTimes]] = []
            dense_times = []
            for place in range(passes + dense_runs):
                if len(dense_times) * (passes + dense_runs) <= place * dense_runs:  # evenly spread, and first of all
                    dense_times.append(dense.run(next(inputs)))
                    done.append((*full, dense_times[-1]))
                else:
                    start = (place - len(dense_times)) * shape.layers
                    widths = some_heads[start : start + shape.layers], some_filters[start : start + shape.layers]
                    cut_model = _MarkedModel(model, adapter, *widths, clock)
                    done.append((*widths, cut_model.run(next(inputs))))
                steps.update()
            if round_index > 0:  # the first round warms up
                shares.add(done, statistics.median(times.total for times in dense_times))
        steps.close()
    return shares.times()


def measured_filters(most: int, grid: int) -> list[int]:
    """0, the multiples of `grid`, `most`; and 1, `most` - 1 and some odd numbers half-way between multiples.

    Matrix products are tiled: a width that is no multiple of a vector or a tile takes much longer than one that
    is. A straight line from multiple to multiple would miss that for most numbers.
    """
    multiples = list(range(grid, most, grid))
    step = max(1, len(multiples) // BETWEEN)
    between = [(count + grid // 2) | 1 for count in [0, *multiples][::step]] if grid > 2 else []
    return sorted({0, 1, max(most - 1, 0), most, *multiples, *(count for count in between if count < most)})


class _Shares:
    """Times as shares of the dense model's in the same round, over all rounds."""

    def __init__(self, heads: list[int], filters: list[int]):
        self.heads: dict[int, list[float]] = {count: [] for count in heads}
        self.filters: dict[int, list[float]] = {count: [] for count in filters}
        self.rest: list[float] = []
        self.dense: list[float] = []

    def add(self, done: list[tuple[list[int], list[int], PassTimes]], dense_ms: float) -> None:
        """One round: what every pass kept in its layers, and its times; and the dense model's ms."""
        self.dense.append(dense_ms)
        unit = dense_ms if dense_ms > 0 else 1.0  # a clock that stood still for a while
        for heads, filters, times in done:
            self.rest.append(times.rest / unit)
            for n, m, (attention, ffn) in zip(heads, filters, times.blocks, strict=True):
                self.heads[n].append(attention / unit)
                self.filters[m].append(ffn / unit)

    def times(self) -> BlockTimes:
        """Medians, in ms of the dense model's median; what a clock that runs backwards makes negative is 0."""
        dense = statistics.median(self.dense)
        unit = dense if dense > 0 else 1.0

        def ms(shares: list[float]) -> float:
            return max(statistics.median(shares), 0.0) * unit

        return BlockTimes(
            {count: ms(shares) for count, shares in self.heads.items()},
            {count: ms(shares) for count, shares in self.filters.items()},
            ms(self.rest),
            unit,
        )


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


class _MarkedModel:
    """A copy of the model whose layers keep their first heads and filters (which ones does not matter to time).

    Its layers mark their beginning, the end of their attention block, and their end. What nothing is cut from is the
    model's own, not copied.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, heads: list[int], filters: list[int], clock: _Clock):
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        self.model, self.clock = copy.deepcopy(model, shared), clock
        layers = adapter.layers(self.model)
        self.marks: list[list[object]] = [[] for _ in layers]
        for marks, layer in zip(self.marks, layers, strict=True):
            parts = adapter.parts(layer)
            layer.register_forward_pre_hook(self._marking(marks))
            if parts.norm_after_attention is not None:
                parts.norm_after_attention.register_forward_hook(self._marking(marks))
            else:
                (parts.norm_before_ffn or parts.fc1).register_forward_pre_hook(self._marking(marks))
            layer.register_forward_hook(self._marking(marks))
        cut(self.model, adapter, [list(range(n)) for n in heads], [list(range(m)) for m in filters])

    def _marking(self, marks: list[object]):
        def hook(module: nn.Module, *_: object) -> None:
            marks.append(self.clock.mark())

        return hook

    def run(self, inputs: dict[str, Tensor]) -> PassTimes:
        """One forward pass."""
        for marks in self.marks:
            marks.clear()
        self.clock.wait()
        begin = self.clock.mark()
        with torch.inference_mode():
            self.model(**inputs)
        end = self.clock.mark()
        self.clock.wait()
        ms = self.clock.ms
        # an FFN run in chunks of the sequence may pass its boundary several times
        blocks = [(ms(marks[0], marks[1]), ms(marks[1], marks[-1])) for marks in self.marks]
        return PassTimes(ms(begin, end), blocks)


def _spread(counts: list[int], size: int, order: random.Random) -> list[int]:
    """`size` counts in random order, each as often as the others to within one."""
    chosen = counts * (size // len(counts)) + order.sample(counts, size % len(counts))
    order.shuffle(chosen)
    return chosen
