"""Post-training pruning of transformers: from a fine-tuned encoder to a smaller, faster one in seconds, no retraining.

    from effnn import ltp
    result = ltp.prune(model, calibration_loader, target=ltp.Macs(0.6))
    small = result.materialize()
    small.save_pretrained(folder)           # and ltp.load_pruned(folder), or AutoModel....from_pretrained(folder)

Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022. README.md is the method card.
"""

from effnn.ltp.adapters import Adapter, LayerParts, adapter_for, register_adapter
from effnn.ltp.export import export_padded
from effnn.ltp.fisher import Calibration, calibrate
from effnn.ltp.latency import search_latency
from effnn.ltp.latency_measure import compare_latency, measure_latency
from effnn.ltp.latency_table import Latency, LatencyTable
from effnn.ltp.macs import MacCost, Macs, search_macs
from effnn.ltp.masks import BudgetTooSmall, Masks, Shape, masked
from effnn.ltp.prune import LatencyCheck, PruneReport, PruneResult, Stage, prune
from effnn.ltp.pruned_models import load_pruned, register_pruned
from effnn.ltp.rearrange import quadratic_loss, rearrange
from effnn.ltp.shrink import pad, shrink
from effnn.ltp.tune import LayerTuning, tune_masks

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
