"""One optimizer step of a staged run, and the validation loss. A step never waits for the device.

The loss is the mean cross-entropy in at least float32. Gradients are accumulated over micro-batches and averaged over
ranks (DistributedDataParallel). Rates are set as LambdaLR does: a group's own peak times the factor of the position.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2LMHeadModel

from effnn.base import InvalidInput, evaluating
from effnn.staged.training.clipping import Clip
from effnn.staged.training.ranks import Ranks
from effnn.staged.training.state import Recipe, TrainState


class Stepper:
    """Takes the steps of one stage; a grown model needs a new one. InvalidInput where the batch cannot be divided."""

    def __init__(self, state: TrainState, recipe: Recipe, ranks: Ranks) -> None:
        self.state, self.ranks, self.precision = state, ranks, recipe.precision
        self.rows = recipe.batch_size // ranks.size
        self.micro_batch = recipe.micro_batch or self.rows
        if recipe.batch_size % (ranks.size * self.micro_batch) or self.rows == 0:
            raise InvalidInput(
                f"batch_size={recipe.batch_size} cannot be divided over {ranks.size} ranks into micro-batches of "
                f"{recipe.micro_batch or 'any size'}: choose a multiple of their product"
            )
        self.model = state.model.train()
        self.parallel = self.model
        if ranks.size > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)
        trained = {parameter for group in state.optimizer.param_groups for parameter in group["params"]}
        self.clip = None if recipe.clip is None else Clip(self.model, recipe.clip, trained)

    def __call__(self, batch: Tensor) -> Tensor:
        """One step on token ids (batch_size, context + 1); returns this rank's mean loss, 0-dimensional, detached."""
        state = self.state
        factor = state.schedule(state.position)
        if not factor >= 0:
            raise InvalidInput(f"the schedule gives {factor!r} at position {state.position}: expected 0 or more")
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.model.zero_grad()  # also of what the optimizer does not hold
        own = batch[self.ranks.rank * self.rows :][: self.rows].to(self.ranks.device)
        parts = own.split(self.micro_batch)
        losses = []
        for number, part in enumerate(parts, start=1):
            with self._synchronized(number == len(parts)):
                with autocast(self.precision, self.ranks.device):
                    loss = token_loss(self.parallel, part) / len(parts)
                loss.backward()
            losses.append(loss.detach())
        if self.clip is not None:
            self.clip()
        state.optimizer.step()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _synchronized(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.ranks.size == 1 else self.parallel.no_sync()


def token_loss(model: torch.nn.Module, batch: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of token ids (rows, context + 1) in nats, all `context` positions; in at least float32."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, windows: Tensor, rows: int, precision: str, ranks: Ranks) -> float:
    """Mean loss over `windows` (sequences, context + 1) in eval mode, `rows` at a time, divided among the ranks."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    with evaluating(model), autocast(precision, ranks.device):
        for part in windows[ranks.rank :: ranks.size].split(rows):
            if len(part):
                total += token_loss(model, part, "sum")
    return ranks.sum([float(total)])[0] / windows[:, 1:].numel()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """torch.autocast for "bfloat16", nothing for "float32"."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)
