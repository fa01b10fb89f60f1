"""Independent jobs side by side in processes of their own: one thread each, no orphans, results in order.

The processes are spawned, since a forked child of a process that runs threads (a notebook's kernel does) may hang, and
they end by themselves when their parent is killed.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
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

    function, jobs: what is called, and its arguments job by job; they must be picklable.
    label: of the bar that counts the finished jobs; bars within the processes are silent, as they would be written over
        each other.
    workers: None for as many as the cores hold; with one worker or one job everything runs in this process.
    threads: of each process.

    The first error of a job is raised here; jobs that wait do not start.
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
        silent = _environment("TQDM_DISABLE", "1")
        with silent, ProcessPoolExecutor(workers, context, _start, (os.getpid(), threads)) as pool:
            waiting = [pool.submit(function, *job) for job in jobs]
            try:
                for done in as_completed(waiting):
                    done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in waiting]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable that the processes started inside the block inherit."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _start(parent: int, threads: int) -> None:
    """In a worker: set the threads, and end when the parent is gone."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
