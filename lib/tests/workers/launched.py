"""Functions that test_launch.py runs in the ranks of a launch."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from effnn.comm.groups.lane.call import is_of_communication


def rank_and(word, *, suffix=""):
    return int(os.environ["RANK"]), f"{word}{suffix}"


def all_reduced():
    value = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(value)
    return value


def environment(*names):
    return {name: os.environ.get(name) for name in names} | {"threads": torch.get_num_threads()}


def settings():
    return os.getcwd(), [path for path in sys.path], os.getpgid(0) == os.getpid()


def prints():
    print("first of", os.environ["RANK"])
    print("no newline at the end", end="")


def raises_on(rank, then_wait=60.0):
    if int(os.environ["RANK"]) == rank:
        raise ValueError(f"boom on {rank}\nand a second line")
    time.sleep(then_wait)


def one_dies_in_all_reduce(how, pause=0.05):
    """The last rank dies in the middle of a loop of all_reduce."""
    for step in range(2000):
        if step == 5 and dist.get_rank() == dist.get_world_size() - 1:
            how()
        dist.all_reduce(torch.ones(1000))
        time.sleep(pause)


def errors_of_communication():
    """What is_of_communication says of an error, of a time-out of gloo, and of an error that was raised from that."""
    found = {"ValueError": is_of_communication(ValueError("no"))}
    try:
        try:
            dist.recv(torch.zeros(1), src=1 - dist.get_rank())  # nobody sends
        except RuntimeError as error:
            found["a time-out of gloo"] = is_of_communication(error)
            raise KeyError("of the program") from error
    except KeyError as error:
        found["raised from it"] = is_of_communication(error)
    return found


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def exits_with(code):
    sys.stderr.write("last words\n")
    sys.exit(code)


def exits_at_once(code):
    os._exit(code)


def leaves_a_pid_and_sleeps(folder, child=False):
    Path(folder, f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    if child:
        sleeper = subprocess.Popen(["sleep", "300"])
        Path(folder, f"child-{os.environ['RANK']}").write_text(str(sleeper.pid))
    time.sleep(300)


def holds_the_global_lock(folder):
    """Sleep in C without giving up Python's lock, as MPI's start does: no other thread of the rank runs."""
    Path(folder, f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(300)


def ignores_sigterm_and_sleeps(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    leaves_a_pid_and_sleeps(folder)


def leaves_a_child_and_a_thread(folder):
    sleeper = subprocess.Popen(["sleep", "300"], preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    Path(folder, f"child-{os.environ['RANK']}").write_text(str(sleeper.pid))
    threading.Thread(target=time.sleep, args=(300,)).start()
    return "done"


def returns_something_that_cannot_be_pickled():
    return lambda: None


def segmentation_fault():
    ctypes.string_at(0)
