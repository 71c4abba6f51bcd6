"""Workers as processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from deploy.batch.parts import Part
from deploy.batch.work import Done, Job, Worker
from runtime.errors import EngineError

_MOST_DEATHS = 3  # of workers in a row, without a part done in between

_worker: Worker | None = None  # of this process, where it is one


def run(job: Job, parts: Sequence[Part], processes: int) -> Iterator[Done]:
    """Do parts on several processes of one thread each; yield as they are done.

    A worker that is killed takes its part with it only: workers are started anew and do it again.

    Raises:
        ClearpactError: of a worker; EngineError where workers die again and again.
    """
    if processes == 1:
        worker = Worker(job)
        yield from map(worker.do, parts)
        return
    left = {part.number: part for part in parts}
    deaths = 0
    while left:
        # Not forked: the threads of engines and of Arrow do not survive a fork.
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (job,))
        try:
            numbers = {pool.submit(_do, part): number for number, part in left.items()}
            for future in as_completed(numbers):
                done = future.result()
                del left[numbers[future]]
                deaths = 0
                yield done
        except BrokenProcessPool:
            deaths += 1
            if deaths == _MOST_DEATHS:
                first = min(left.values(), key=lambda part: part.number)
                raise EngineError(
                    f"workers ended {deaths} times, part {first.number} of {first.source} is not done; "
                    "give them more memory or fewer --processes, and start again: it continues"
                ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start(job: Job) -> None:
    global _worker
    _worker = Worker(job)


def _do(part: Part) -> Done:
    assert _worker is not None
    return _worker.do(part)
