"""Worker processes that tokenise units."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinels

from statex_dist.data.corpus.tokenize_unit import TokenizeTask, UnitJob, UnitTokenizer
from statex_dist.data.corpus.unit_files import UnitResult
from statex_dist.errors import DataError

_WAITING_JOBS = 4


def tokenize_units(jobs: Sequence[UnitJob], task: TokenizeTask, workers: int) -> Iterator[tuple[int, UnitResult]]:
    """Yield the index and the result of every job, as they finish.

    A bad unit raises only after the results of all units before it, so that the error (or, where the caller has
    enough by then, its absence) does not depend on the number of workers.

    Args:
        jobs: What to do; begun in this order.
        task: What is the same for all.
        workers: Processes; 1 works in this one.

    Raises:
        DataError: The first bad unit's error, or a process that ended by itself.
    """
    workers = min(workers, max(1, len(jobs)))
    if workers == 1:
        tokenizer = UnitTokenizer(task)
        for i, job in enumerate(jobs):
            yield i, tokenizer.run(job)
        return
    # spawn: a fork of a process that runs threads (torch, a progress bar) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (task,)) as pool:
        try:
            yield from _as_finished(pool, jobs, workers)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process ended by itself (out of memory, or a script without a main guard); use 1 worker"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _as_finished(pool: ProcessPoolExecutor, jobs: Sequence[UnitJob], workers: int) -> Iterator[tuple[int, UnitResult]]:
    pending: dict[Future[UnitResult], int] = {}
    source = iter(enumerate(jobs))
    first_bad: tuple[int, BaseException] | None = None
    while True:
        if first_bad is None:
            for i, job in itertools.islice(source, _WAITING_JOBS * workers - len(pending)):
                pending[pool.submit(_run_job, job)] = i
        if not pending or (first_bad is not None and min(pending.values()) > first_bad[0]):
            break
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=lambda future: pending[future]):
            i = pending.pop(future)
            error = future.exception()
            if error is None:
                yield i, future.result()
            elif first_bad is None or i < first_bad[0]:
                first_bad = i, error
    if first_bad is not None:
        raise first_bad[1]


_tokenizer: UnitTokenizer | None = None


def _start_worker(task: TokenizeTask) -> None:
    global _tokenizer
    # Workers are the parallelism; threads inside each of them would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _tokenizer = UnitTokenizer(task)


def _die_with(sentinel: int) -> None:
    # A pool's worker holds both ends of its own queue, so it would outlive a killed parent, waiting for work for ever.
    wait_for_sentinels([sentinel])
    os._exit(1)


def _run_job(job: UnitJob) -> UnitResult:
    assert _tokenizer is not None
    return _tokenizer.run(job)
