"""Throughput: how many images a second are done with several requests in flight, as many as there are cores for.

It is not one by the latency: a single request leaves cores idle, and several slow each other down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def images_per_second(call: Callable[[], object], *, batch: int, requests: int, seconds: float) -> float:
    """Return how many images a second threads get through, each of which has one request in flight all the time.

    Args:
        call: runs one batch; several threads call it at once, and the engine lets others run meanwhile.
        batch: images of one call.
        requests: threads.
        seconds: to fill; every thread calls twice at least, the first time untimed.
    """
    counts, ends = [0] * requests, [0.0] * requests
    failures: list[BaseException] = []
    began = [0.0]
    ready = threading.Barrier(requests, action=lambda: began.__setitem__(0, time.perf_counter()))

    def request(number: int) -> None:
        try:
            call()
            ready.wait()
            while not counts[number] or time.perf_counter() - began[0] < seconds:
                call()
                counts[number] += 1
            ends[number] = time.perf_counter()
        except BaseException as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=request, args=(number,)) for number in range(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
    return sum(counts) * batch / (max(ends) - began[0])
