"""Plain versions of effnn.staged's operators, written tensor by tensor, and the tiny models that its tests grow.

`doubled_*` is the arithmetic of the authors' released code for width 2: two copies side by side.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, LENGTH = 40, 12


def tiny_gpt2(seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> GPT2LMHeadModel:
    """2 layers, 16 wide, 2 heads, no dropout, eval mode; every tensor away from its initial zeros and ones."""
    torch.manual_seed(seed)
    defaults = {"n_layer": 2, "n_embd": 16, "n_head": 2, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**{**defaults, **sizes, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def tokens(seed: int = 0, rows: int = 4) -> Tensor:
    """Random token ids (rows, LENGTH)."""
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_of(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy in the model's own precision (transformers casts logits to float32 in its loss)."""
    logits = model(input_ids=batch).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def gradients(model: GPT2LMHeadModel, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, scheduler=None) -> None:
    """`steps` steps, each on a mini-batch of its own number."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, tokens(seed=1000 + step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def trained(steps: int = 5, lr: float = 1e-2, seed: int = 0, **settings) -> tuple[GPT2LMHeadModel, torch.optim.AdamW]:
    """A tiny model and its AdamW after some steps."""
    model = tiny_gpt2(seed=seed, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    train(model, optimizer, steps)
    return model, optimizer


def moments_by_name(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, key: str) -> dict[str, Tensor]:
    return {
        name: optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def block_diagonal_thirds(weight: Tensor) -> Tensor:
    query, key, value = weight.chunk(3, dim=1)
    return torch.cat([torch.block_diag(query, query), torch.block_diag(key, key), torch.block_diag(value, value)], 1)


def doubled(name: str, x: Tensor) -> Tensor:
    """Layout of one tensor after width 2, unscaled."""
    if name in ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"):
        return torch.cat([x, x], dim=1)
    if name.endswith("attn.c_attn.weight"):
        return block_diagonal_thirds(x)
    if name.endswith("attn.c_attn.bias"):
        query, key, value = x.chunk(3)
        return torch.cat([query, query, key, key, value, value])
    if x.dim() == 2:
        return torch.block_diag(x, x)
    return torch.cat([x, x])


def doubled_values(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: doubled(name, x) / 2 if ".ln_f." in name else doubled(name, x) for name, x in values.items()}


def doubled_moments(values: dict[str, Tensor], power: int) -> dict[str, Tensor]:
    """power: 1 for exp_avg, 2 for exp_avg_sq."""
    return {name: doubled(name, x) if ".ln_f." in name else doubled(name, x) / 2**power for name, x in values.items()}


def true_gradient(name: str, g: Tensor, k: int) -> Tensor:
    """The gradient of a tensor grown k times, from the small one's: every block of a matrix holds g / k."""
    if ".ln_f." in name:
        return g.repeat(k)
    if name in ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"):
        return g.repeat(1, k) / k
    thirds = g.chunk(3, dim=-1) if "c_attn" in name else (g,)
    repeats = (k, k) if g.dim() == 2 else (k,)
    return torch.cat([third.repeat(*repeats) for third in thirds], dim=-1) / k
