"""What `prune` returns: the masks after each stage, and a report of what was done and found."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from effnn.ltp.pruning.latency.measured_search import SearchAttempt
from effnn.ltp.pruning.latency.table import Latency
from effnn.ltp.pruning.macs import Macs
from effnn.ltp.pruning.masks import Masks
from effnn.ltp.pruning.shrinking.saving import export_padded
from effnn.ltp.pruning.shrinking.shrink import shrink
from effnn.ltp.pruning.tune import LayerTuning


@dataclass(frozen=True)
class Stage:
    """What one stage took and gave.

    name: "calibrate", "search", "rearrange" or "tune".
    seconds: its own time, the held-out loss of its masks included.
    mac_ratio: share of the dense MACs.
    heads_per_layer: kept heads.
    filters_per_layer: kept filters.
    loss: mean loss per label on the held-out calibration rows under its masks, None where nothing is held out.
    latency_ms: predicted by the latency table; None for a target in MACs.
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
    """Milliseconds of one forward pass, as the latency table predicts them and as measured on the assembled models.

    dense_predicted: of the dense model, by the table.
    dense_measured: of the dense model, measured.
    predicted: of the pruned model, by the table.
    measured: of the pruned model, measured.
    ratio: measured pruned over dense, median over the rounds in which the two took turns; what counts for the budget.
    attempts: what the search proposed and measured to correct itself, as shares of the dense latency; empty with
        corrections=0. The model that was chosen is measured once more at the end.
    """

    dense_predicted: float
    dense_measured: float
    predicted: float
    measured: float
    ratio: float
    attempts: tuple[SearchAttempt, ...] = ()


@dataclass(frozen=True)
class PruneReport:
    """What was done, stage by stage and layer by layer.

    target: the budget.
    rows: calibration rows.
    seq_len: tokens in the MAC formula.
    calibration_loss: mean over mini-batches, of the dense model.
    chance_loss: of a constant prediction, None where it is not known (always with a loss of your own).
    dense_loss: of the dense model on the held-out rows, None where nothing is held out.
    stages: in their order.
    layers: what tuning did in each layer, for heads and for filters.
    tuning_accepted: False if the held-out loss rose and the scales were dropped; None without tuning.
    tuning_reason: why they were dropped, or why they are used although no held-out loss judged them; "" otherwise.
    latency: for a target in latency.
    peak_bytes: memory above the level at the call (GPU: allocator; CPU: resident set), None if not measured.
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
    tuning_reason: str = ""
    latency: LatencyCheck | None = None
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def accepted_layers(self) -> int:
        """Number of entries of `layers` whose scales were accepted."""
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


def _plain(value: object) -> object:
    """Numbers, texts, lists and dicts only; NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
