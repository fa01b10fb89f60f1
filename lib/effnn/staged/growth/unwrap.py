"""The plain model, optimizer and scheduler in what people hold: wrappers of torch and of accelerate (HF Trainer).

A wrapper holds the same tensors and the same state, so nothing is lost by looking inside. What shards or quantizes the
tensors themselves is no wrapper in this sense: `check_model` refuses it.
"""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def plain_model(model: object) -> object:
    """The model inside DistributedDataParallel, DataParallel and torch.compile; anything else as it is."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def plain_optimizer(optimizer: object) -> object:
    """The torch optimizer inside accelerate's AcceleratedOptimizer; anything else as it is."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def plain_scheduler(scheduler: object) -> object:
    """The torch scheduler inside accelerate's AcceleratedScheduler; anything else as it is."""
    while not isinstance(scheduler, LRScheduler) and (inner := getattr(scheduler, "scheduler", None)) is not None:
        scheduler = inner
    return scheduler
