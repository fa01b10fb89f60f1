"""A clock that counts work instead of seconds."""

import contextlib
import time

from torch import nn

from effnn.base import hooked


@contextlib.contextmanager
def counting_clock(monkeypatch):
    """Time stands still but for linear maps, which take one second per multiply-accumulate; yields the clock."""
    now = [0.0]

    def advance(module, inputs, output):
        if isinstance(module, nn.Linear):
            now[0] += module.weight.numel() * inputs[0].shape[:-1].numel()

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with hooked([nn.modules.module.register_module_forward_hook(advance)]):
        yield lambda: now[0]
