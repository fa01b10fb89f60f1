"""Post-training pruning of transformers: from a fine-tuned encoder to a smaller, faster one in seconds, no retraining.

    from effnn import ltp
    result = ltp.prune(model, calibration_loader, target=ltp.Macs(0.6))
    small = result.materialize()
    small.save_pretrained(folder)           # and ltp.load_pruned(folder), or AutoModel....from_pretrained(folder)

Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022. README.md is the method card.
"""

from effnn.ltp.pruning.adapters import Adapter, LayerParts, adapter_for, register_adapter
from effnn.ltp.pruning.calibration.calibrate import Calibration, calibrate
from effnn.ltp.pruning.latency.measure import compare_latency, measure_latency
from effnn.ltp.pruning.latency.search import search_latency
from effnn.ltp.pruning.latency.table import Latency, LatencyTable
from effnn.ltp.pruning.macs import MacCost, Macs, search_macs
from effnn.ltp.pruning.masks import BudgetTooSmall, Masks, Shape, masked
from effnn.ltp.pruning.prune import prune
from effnn.ltp.pruning.rearrange import quadratic_loss, rearrange
from effnn.ltp.pruning.report import LatencyCheck, PruneReport, PruneResult, Stage
from effnn.ltp.pruning.shrinking.models import register_pruned
from effnn.ltp.pruning.shrinking.saving import export_padded, load_pruned
from effnn.ltp.pruning.shrinking.shrink import pad, shrink
from effnn.ltp.pruning.tune import LayerTuning, tune_masks

__all__ = [
    "Adapter",
    "BudgetTooSmall",
    "Calibration",
    "Latency",
    "LatencyCheck",
    "LatencyTable",
    "LayerParts",
    "LayerTuning",
    "MacCost",
    "Macs",
    "Masks",
    "PruneReport",
    "PruneResult",
    "Shape",
    "Stage",
    "adapter_for",
    "calibrate",
    "compare_latency",
    "export_padded",
    "load_pruned",
    "masked",
    "measure_latency",
    "pad",
    "prune",
    "quadratic_loss",
    "rearrange",
    "register_adapter",
    "register_pruned",
    "search_latency",
    "search_macs",
    "shrink",
    "tune_masks",
]
