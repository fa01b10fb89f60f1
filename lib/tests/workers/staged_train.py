"""Runs of the staged trainer in processes of their own: one that is killed, and one of two ranks.

python staged_train.py kill <folder> <what> <when>    kills itself: in a step, or while it writes a checkpoint
python -m torch.distributed.run ... staged_train.py ranks <folder>
"""

import dataclasses
import errno
import json
import os
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config

from effnn.base import EffnnError, folder_lock
from effnn.staged import Recipe, Stage, WarmupStableDecay, train
from effnn.staged.training.checkpoints import checkpoint
from effnn.staged.training.step import Stepper

TOKENS = torch.randint(0, 40, (3000,), generator=torch.Generator().manual_seed(2))
VALIDATION = TOKENS[:500]
STAGES = [Stage(20), Stage(25, width=2, depth=2, entry=10, rewarm=12, adam_width_rule="1/k")]


def config(**settings) -> GPT2Config:
    """A tiny model, with dropout unless told otherwise."""
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 12}
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
    return GPT2Config(**{**sizes, **rates, "bos_token_id": 0, "eos_token_id": 0, **settings})


def plain_config() -> GPT2Config:
    return config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def recipe(**changes) -> Recipe:
    given = {"batch_size": 4, "context": 12, "learning_rate": 1e-2, "schedule": WarmupStableDecay(3, 60, 20)}
    steps = {"evaluate_every": 10, "checkpoint_every": 7, "evaluate_sequences": 9}
    return Recipe(**{**given, "clip": 0.5, **steps, **changes})


def run(folder=None, start=None, stages=STAGES, how=None, tokens=TOKENS, **options):
    start, how = start or config(), how or recipe()
    return train(start, stages, how, tokens, VALIDATION, folder=folder, progress=False, **options)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: str, what: str, when: int) -> None:
    """A run that is killed in the middle of step `when`, or while it writes its checkpoint number `when`."""
    owner, name = (Stepper, "__call__") if what == "step" else (checkpoint, "save_optimizer")
    before, calls = getattr(owner, name), []

    def counting(*arguments):
        calls.append(None)
        result = before(*arguments)
        if len(calls) == when:
            kill()
        return result

    setattr(owner, name, counting)
    run(folder)


def caught(call) -> str:
    """The kind and text of the error that `call` raises."""
    try:
        call()
    except (EffnnError, OSError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def no_space(*arguments) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ranks(folder: str) -> None:
    """All runs of two ranks; each rank writes its findings to <folder>/<rank>.json."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, found, here = dist.get_rank(), {}, Path(folder)
    how = recipe(batch_size=8, micro_batch=2)
    state = run(here / "run", plain_config(), how=how)
    found["points"] = [dataclasses.asdict(point) for point in state.points]
    found["weights"] = [parameter.flatten().tolist() for parameter in state.model.parameters()]
    again = run(here / "run", plain_config(), how=how, stop=lambda point: 1 / 0)
    found["again"] = [len(again.points), again.step]
    found["other run"] = caught(lambda: run(here / "run", plain_config(), [Stage(1)], how))
    found["stop rule"] = caught(lambda: run(None, plain_config(), how=how, stop=lambda point: 1 / 0))
    (here / "file").touch()
    found["no folder"] = caught(lambda: run(here / "file", plain_config(), how=how))
    saved = checkpoint.save_optimizer
    checkpoint.save_optimizer = no_space  # asked on rank 0 alone
    found["no space"] = caught(lambda: run(here / "full", plain_config(), how=how))
    checkpoint.save_optimizer = saved
    with folder_lock(here) if rank == 0 else nullcontext():  # another process is in there
        found["in use"] = caught(lambda: run(here, plain_config(), how=how))
    found["models"] = caught(lambda: run(None, plain_config(), how=recipe(seed=rank)))
    found["batch"] = caught(lambda: run(None, plain_config(), how=recipe(batch_size=6, micro_batch=2)))
    found["diverged"] = caught(lambda: run(None, plain_config(), how=recipe(learning_rate=1e25, clip=None)))
    halfway = run(None, config(), [Stage(5)], how)
    found["stopped"] = run(None, halfway, [Stage(5)], how, stop=lambda point: rank == 0).step
    found["dropout"] = [parameter.sum().item() for parameter in halfway.model.parameters()]
    (here / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        killed(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        ranks(sys.argv[2])
