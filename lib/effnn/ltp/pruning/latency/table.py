"""The latency target, and the table that predicts a pruned model's latency (Kwon et al. 2022, section 4.1).

A table holds the milliseconds of one layer's attention block for every number of heads and of its FFN block for every
number of filters, and of everything outside the layers. The layers of an encoder are alike, so one pair of columns
serves all. Predictions add these up; `compare_latency` shows on the assembled model whether that holds. A table belongs
to one device, dtype, batch and length; nothing here extrapolates from one to another.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from effnn.base import InvalidInput, write_json
from effnn.ltp.pruning.latency.blocks import measure_blocks
from effnn.ltp.pruning.latency.measure import check_device, placed_copy
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.options import check_choice, check_count, check_floating, is_number

_FORMAT = 1
_LEAST_MS = 1e-6


@dataclass(frozen=True)
class Latency:
    """Target: a latency of at most `ratio` of the dense model's, everything outside the layers included.

    The search goes by a table of measured blocks; `prune` then measures what it proposes (`search_measured`).

    ratio: in (0, 1].
    batch: rows of the deployed model's inputs.
    seq_len: tokens per row (a vision encoder's length is its own).
    device: where it will run; None takes the model's.
    dtype: what it will run in, torch's or its name ("bfloat16"); None takes the model's.
    latency_model: "table" searches the measured table itself, "piecewise" the paper's fit to it.
    grid: filters are timed at multiples of it, which the search prefers where they are faster, and at some numbers
        between.
    repeats: timed runs, of which the median counts.
    corrections: how often the search may be repeated where the assembled model, measured in turn with the dense one, is
        over the budget; 0 believes the table.
    min_heads: kept in every layer whatever their importance.
    min_filters: likewise.
    """

    ratio: float
    batch: int = 32
    seq_len: int = 128
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    latency_model: str = "table"
    grid: int = 32
    repeats: int = 11
    corrections: int = 3
    min_heads: int = 0
    min_filters: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.ratio, 0, 1):
            raise InvalidInput(f"Latency(ratio={self.ratio!r}): expected a number above 0 and at most 1, such as 0.6")
        for name in ("batch", "seq_len", "grid", "repeats"):
            check_count(f"Latency.{name}", getattr(self, name), 1)
        for name in ("corrections", "min_heads", "min_filters"):
            check_count(f"Latency.{name}", getattr(self, name), 0)
        check_choice("Latency.latency_model", self.latency_model, "table", "piecewise")
        self.torch_dtype()

    def torch_dtype(self) -> torch.dtype | None:
        """The dtype as torch's."""
        dtype = getattr(torch, self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        check_floating("Latency.dtype", dtype)
        return dtype

    def relaxed(self) -> "Latency":
        """The teacher's target in mask tuning: the square root of the ratio (section 4.3)."""
        return replace(self, ratio=math.sqrt(self.ratio))


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of the blocks of a layer by what they keep, and of the rest of the model.

    head_ms: (H + 1,), of the attention block with 0, 1, ... heads, residual sum and normalisations included.
    filter_ms: (F + 1,), of the FFN block with 0, 1, ... filters, likewise.
    rest_ms: of everything outside the layers.
    head_points: the measured (heads, median ms) before they were made non-decreasing.
    filter_points: likewise, of filters.
    dense_ms: of the dense model, measured in the same run; None if it was not.
    batch: rows of the inputs; like all that follows, None (or empty) for a table from values.
    seq_len: tokens per row.
    device: type of the device.
    dtype: name of the dtype.
    layers: of the model that was measured.
    hidden: its hidden size.
    provenance: machine, versions and settings of the measurement.
    """

    head_ms: tuple[float, ...] = field(repr=False)
    filter_ms: tuple[float, ...] = field(repr=False)
    rest_ms: float = 0.0
    head_points: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    filter_points: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    dense_ms: float | None = None
    batch: int | None = None
    seq_len: int | None = None
    device: str | None = None
    dtype: str | None = None
    layers: int | None = None
    hidden: int | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("head_ms", "filter_ms"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) < 2 or not all(math.isfinite(value) and value >= 0 for value in values):
                raise InvalidInput(f"LatencyTable.{name}: expected the ms, finite and at least 0, of 0, 1, ... units")
            object.__setattr__(self, name, values)
        if not (math.isfinite(self.rest_ms) and self.rest_ms >= 0):
            raise InvalidInput(f"LatencyTable.rest_ms={self.rest_ms}: expected a finite number of at least 0")
        if self.head_ms[-1] + self.filter_ms[-1] + self.rest_ms <= 0:
            raise InvalidInput("LatencyTable: the dense model takes no time; expected ms above 0")

    @classmethod
    def from_values(
        cls, head_ms: Sequence[float], filter_ms: Sequence[float], rest_ms: float = 0.0, **fields: object
    ) -> "LatencyTable":
        """A table of given ms for 0, 1, ... heads and 0, 1, ... filters; they need not rise."""
        return cls(tuple(head_ms), tuple(filter_ms), float(rest_ms), **fields)

    @classmethod
    def measure(cls, model: PreTrainedModel, target: Latency, progress: bool = True) -> "LatencyTable":
        """The table of `model` under `target`; how the blocks are timed is described in blocks.py.

        Measured points are made non-decreasing (isotonic regression) and joined by straight lines, whatever the clock
        says; the multiples of the grid and the numbers of filters between them separately, as the latter take longer.
        Raises InvalidInput for an unknown or already pruned model, NotAvailable for a device that
        is not here.
        """
        placed = placed_copy(model, check_device(target.device), target.torch_dtype())
        times = measure_blocks(placed, target.batch, target.seq_len, target.grid, target.repeats, progress)
        on_gpu, shape = placed.device.type == "cuda", Shape.of(placed)
        filter_ms = _tiled(times.filters, target.grid)
        return cls(
            head_ms=_interpolated(times.heads),
            filter_ms=filter_ms if filter_ms[-1] > 0 else _even(times.filters),
            rest_ms=times.rest_ms,
            head_points=tuple(times.heads.items()),
            filter_points=tuple(times.filters.items()),
            dense_ms=times.dense_ms,
            batch=target.batch,
            seq_len=target.seq_len,
            device=placed.device.type,
            dtype=str(placed.dtype).removeprefix("torch."),
            layers=shape.layers,
            hidden=shape.hidden,
            provenance={
                "model_type": placed.config.model_type,
                "attention": placed.config._attn_implementation,
                "processor": torch.cuda.get_device_name(placed.device) if on_gpu else platform.processor(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "grid": target.grid,
                "repeats": target.repeats,
            },
        )

    @property
    def _widths(self) -> tuple[int, int]:
        """Heads and filters of a layer."""
        return len(self.head_ms) - 1, len(self.filter_ms) - 1

    def predict(self, masks: Masks) -> float:
        """Ms of the model pruned by `masks`; InvalidInput for masks of other widths than the table's."""
        widths, found = self._widths, (masks.heads.shape[1], masks.filters.shape[1])
        if found != widths:
            raise InvalidInput(f"masks of (heads, filters)={found} per layer; the latency table is of {widths}")
        return self.predict_counts(masks.heads_per_layer, masks.filters_per_layer)

    def predict_counts(self, heads: Sequence[int], filters: Sequence[int]) -> float:
        """Ms of a model whose layers keep these numbers of heads and filters."""
        blocks = [self.head_ms[count] for count in heads] + [self.filter_ms[count] for count in filters]
        return self.rest_ms + math.fsum(blocks)

    def dense_prediction(self, layers: int) -> float:
        """Ms predicted for the dense model of `layers` layers: what ratios refer to."""
        heads, filters = self._widths
        return self.predict_counts([heads] * layers, [filters] * layers)

    def check(self, target: Latency, model: PreTrainedModel | None = None) -> None:
        """InvalidInput if the table was measured for other inputs, another device type or dtype than the target's.

        What the target leaves open is the model's, where one is given; then the sizes of its layers must fit too.
        """
        wanted = {"batch": target.batch, "seq_len": target.seq_len}
        device, dtype = target.device or (model and model.device), target.torch_dtype() or (model and model.dtype)
        if device is not None:
            wanted["device"] = torch.device(device).type
        if dtype is not None:
            wanted["dtype"] = str(dtype).removeprefix("torch.")
        for name, value in wanted.items():
            if getattr(self, name) not in (None, value):
                raise InvalidInput(
                    f"the latency table was measured with {name}={getattr(self, name)!r}, the target says {value!r}: "
                    "measure a table for the target (LatencyTable.measure)"
                )
        if model is not None:
            shape, (heads, filters) = Shape.of(model), self._widths
            sizes = {"layers": self.layers, "heads": heads, "filters": filters, "hidden": self.hidden}
            for name, size in sizes.items():
                if size not in (None, getattr(shape, name)):
                    raise InvalidInput(
                        f"the latency table is of a model with {name}={size}, this model has {getattr(shape, name)}: "
                        "measure a table of this model (LatencyTable.measure)"
                    )

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON, atomically; returns the path."""
        return write_json(path, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a table that `save` wrote; InvalidInput for any other file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise InvalidInput(f"{path}: a latency table of another format; measure it anew")
            for name in ("head_points", "filter_points"):
                values[name] = tuple((int(count), float(ms)) for count, ms in values[name])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(
                f"{path}: not a latency table ({error}); expected a file of LatencyTable.save"
            ) from error


def _even(points: dict[int, float]) -> tuple[float, ...]:
    """Where the clock stood still: units that all cost the same."""
    return tuple(_LEAST_MS * count for count in range(max(points) + 1))


def _tiled(points: dict[int, float], grid: int) -> tuple[float, ...]:
    """Ms of 0, 1, ... filters: multiples of the grid (and all filters) on one curve, the others on a second one."""
    most = max(points)
    aligned = {count: ms for count, ms in points.items() if count % grid == 0 or count == most}
    others = {count: ms for count, ms in points.items() if count not in aligned}
    values = list(_interpolated(aligned))
    if others:
        rough = _interpolated(others | {0: 0.0})  # 0 belongs to the first curve; here it only begins the range
        values[: len(rough)] = [
            ms if count % grid == 0 else rough[count] for count, ms in enumerate(values[: len(rough)])
        ]
    return tuple(values)


def _interpolated(points: dict[int, float]) -> tuple[float, ...]:
    """Ms of 0, 1, ... units: the measured points made non-decreasing by least squares, joined by straight lines."""
    counts = sorted(points)
    levels = isotonic_regression([points[count] for count in counts]).x
    return tuple(np.interp(range(counts[-1] + 1), counts, levels).tolist())
