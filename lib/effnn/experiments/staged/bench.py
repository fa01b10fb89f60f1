"""The benchmark of growth; data/bench.csv describes its key.

The time of growing depends on shapes, not on values, so weights and moments are random.
"""

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from effnn import staged
from effnn.base import PeakMemory, interleave, seed_everything, threads
from effnn.experiments.shared.measured import Measured
from effnn.experiments.shared.pool import cores

ROUNDS = 5


def grow_over_copy() -> Measured:
    """The time of growing GPT-2 small and its Adam state to twice the width over that of copying the result.

    Both write into fresh memory and free it again. Also measured: the peak memory of growing, and the time with the
    released code's moments, which leave three quarters of a matrix at zero.
    """
    model, optimizer = _gpt2_small()

    def grow(moments: str = "consistent") -> staged.Grown:
        return staged.grow(model, optimizer, width=2, noise=0.0, moments=moments)

    with threads(cores()):
        memory = _peak_memory(grow, _tensors(model, optimizer))
        grown = grow()
        output = _tensors(grown.model, grown.optimizer)
        times = interleave(
            {
                "grow": grow,
                "copy": lambda: [tensor.clone() for tensor in output],
                "grow, authors' moments": lambda: grow("authors"),
            },
            rounds=ROUNDS,
        )
        used = torch.get_num_threads()
    seconds = {name: timing.seconds for name, timing in times.items()}
    note = "model, exp_avg, exp_avg_sq; fresh memory for both"
    return Measured(times["grow"].over(times["copy"]), times["grow"].load, seconds, used, note, memory)


BENCHMARKS = {"staged.grow_over_copy": grow_over_copy}


def _peak_memory(grow, old: list[Tensor]) -> dict[str, float]:
    """Peak bytes, the old state included, and their bound: old and new state and a tenth more."""
    with PeakMemory() as memory:
        grown = grow()
    old_bytes, new_bytes = _bytes(old), _bytes(_tensors(grown.model, grown.optimizer))
    sizes = {"old_bytes": old_bytes, "new_bytes": new_bytes}
    if memory.peak_bytes is None:
        return sizes
    peak, bound = old_bytes + memory.peak_bytes, 1.1 * (old_bytes + new_bytes)
    return {"peak_bytes": peak, "bound_bytes": bound, "peak_over_bound": peak / bound, **sizes}


def _gpt2_small() -> tuple[GPT2LMHeadModel, AdamW]:
    """12 layers of width 768, and an AdamW with moments for all parameters."""
    seed_everything(0)
    model = GPT2LMHeadModel(GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    optimizer = AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _tensors(model: GPT2LMHeadModel, optimizer: AdamW) -> list[Tensor]:
    """Weights and optimizer state; a tied head counts once."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [parameter.detach() for parameter in model.parameters()] + moments


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
