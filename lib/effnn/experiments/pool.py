"""Independent jobs side by side in processes of their own: one thread each, no orphans, results in order.

The processes are spawned, since a forked child of a process that runs threads (a notebook's kernel does) may hang, and
they end by themselves when their parent is killed.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[..., T], jobs: Sequence[tuple], label: str, workers: int | None = None, threads: int = 1
) -> list[T]:
    """Return [function(*job) for job in jobs], run in at most `workers` processes of `threads` torch threads each.

    workers: None for as many as the cores hold; with one worker or one job everything runs in this process. function
    and its arguments must be picklable. The first error of a job is raised here and ends the others.
    """
    workers = min(len(jobs), workers or max(1, cores() // threads))
    with tqdm(total=len(jobs), desc=label, leave=False) as bar:
        if workers <= 1:
            results = []
            for job in jobs:
                results.append(function(*job))
                bar.update()
            return results
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start, (os.getpid(), threads)) as pool:
            waiting = [pool.submit(function, *job) for job in jobs]
            try:
                for done in as_completed(waiting):
                    done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in waiting]


def _start(parent: int, threads: int) -> None:
    """In a worker: set the threads, and end when the parent is gone."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
