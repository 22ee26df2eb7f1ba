"""Workers that each compute tiles of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import torch

Job = TypeVar("Job")


MOST = 4
"""Workers, at most: a fifth of their time is Python's, which has one lock. More threads are shared among them."""


def workers_for(device: torch.device) -> int:
    """How many workers to use: one for each of PyTorch's threads on a CPU, up to `MOST`; one elsewhere."""
    return min(torch.get_num_threads(), MOST) if device.type == "cpu" else 1


def spread(jobs: Iterable[Job], workers: list[Callable[[Job], None]]) -> None:
    """Run every job once, each worker taking the next as it gets free.

    One tile takes a dozen calls of a few dozen microseconds each: too little to be shared between threads
    call by call, where all wait for the slowest a dozen times a tile. So PyTorch's threads become ours for
    the time of the call, one (or a fair share) for each worker.
    """
    if len(workers) == 1:
        for job in jobs:
            workers[0](job)
        return
    threads, queue, lock = torch.get_num_threads(), iter(jobs), Lock()
    inference = torch.is_inference_mode_enabled()

    def drain(worker: Callable[[Job], None]) -> None:
        torch.set_num_threads(max(threads // len(workers), 1))
        # Modes are settings of each thread: the caller's inference mode holds here too, and gradients are the
        # operator's own affair. In this order, since leaving inference mode turns their recording on.
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with lock:
                    try:
                        job = next(queue)
                    except StopIteration:
                        return
                worker(job)

    try:
        with ThreadPoolExecutor(len(workers), thread_name_prefix="vicinal") as pool:
            for done in [pool.submit(drain, worker) for worker in workers]:
                done.result()
    finally:
        torch.set_num_threads(threads)
