"""Where the time of a plan goes: the phases that trtexec names, run by run, and several streams at once.

enqueue     host time to give the network to the GPU; with a CUDA graph, one launch
H2D         copy of the inputs to the GPU, by CUDA events
compute     the network, by CUDA events
D2H         copy of the outputs back, by CUDA events
end to end  host time from frames in the app's memory to outputs there: all of the above, the host's own copies
            and the wait
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.measure.statistics import SETTLE_MS, Percentiles, told
from runtime import command
from runtime.engines.tensorrt.cuda import Resources
from runtime.engines.tensorrt.session import TensorRTSession
from runtime.engines.tensorrt.worker import Worker

PHASES = ("enqueue", "h2d", "compute", "d2h", "end_to_end")
TITLES = {"enqueue": "enqueue", "h2d": "H2D", "compute": "compute", "d2h": "D2H", "end_to_end": "end to end"}


def phase_samples(
    session: TensorRTSession,
    images: np.ndarray,
    contenders: dict[str, tuple[tuple[str, ...], bool]],
    *,
    runs: int | None,
    seconds: float,
    warm_up_seconds: float = 0.5,
    label: str = "measuring",
) -> dict[str, np.ndarray]:
    """Time the phases of several ways to run a plan, in turns.

    Args:
        session: the plan.
        images: uint8 [N, H, W, C].
        contenders: name -> outputs that are copied back, and whether the network is launched as a CUDA graph.
        runs: rounds to measure; None fills `seconds` per contender, with 20 rounds at least.
        seconds: see `runs`.
        warm_up_seconds: runs before anything is timed, per contender.
        label: of the progress bar.

    Returns:
        Name -> milliseconds float64 [runs, 5], in the order of PHASES.
    """
    with contextlib.ExitStack() as stack:
        timers = {
            name: stack.enter_context(_timer(session, images, *contender))
            for name, contender in contenders.items()
        }
        typical_s = 0.0
        for timer in timers.values():
            began, calls = time.perf_counter(), 0
            while calls < 3 or time.perf_counter() - began < warm_up_seconds:
                timer.run()
                calls += 1
            typical = (time.perf_counter() - began) / calls
            typical_s += typical + max(typical, SETTLE_MS / 1000)
        rounds = runs or max(20, int(seconds * len(timers) / typical_s))
        samples = {name: np.empty((rounds, len(PHASES))) for name in timers}
        for index in command.progress(range(rounds), label=label):
            for name, timer in timers.items():
                settled = time.perf_counter() + SETTLE_MS / 1000
                timer.run()
                while time.perf_counter() < settled:
                    timer.run()
                samples[name][index] = timer.run()
    return samples


def streams_images_per_second(
    session: TensorRTSession, images: np.ndarray, outputs: tuple[str, ...], *, streams: int, seconds: float
) -> float:
    """Return how many images a second one thread gets through with some runs in flight, each in its own stream."""
    inputs = session.complete(images)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(session.worker()) for _ in range(streams)]
        for worker in workers * 3:  # set up, record, launch
            worker.prepare(inputs)
            worker.launch(outputs)
        for worker in workers:
            worker.wait()
        began, done = time.perf_counter(), 0
        for worker in itertools.cycle(workers):
            worker.prepare(inputs)  # waits for this worker's run before
            worker.launch(outputs)
            done += 1
            if done >= streams and time.perf_counter() - began > seconds:
                break
        for worker in workers:
            worker.wait()
        return done * len(images) / (time.perf_counter() - began)


def as_json(samples: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Return phase -> percentiles of the samples float64 [runs, 5] of one contender."""
    return {phase: asdict(Percentiles.of(samples[:, index])) for index, phase in enumerate(PHASES)}


def table(phases: Mapping[str, Mapping[str, Mapping[str, float | None]] | None]) -> Iterator[str]:
    """Yield a table's lines: one contender and percentile a row, one phase a column, "-" where there is none."""
    yield "                         " + "".join(f"{TITLES[phase]:>11}" for phase in PHASES)
    for name, found in phases.items():
        for percentile in ("p50", "p90", "p95", "p99"):
            cells = [f"{told(found[phase][f'{percentile}_ms'] if found else None):>11}" for phase in PHASES]
            yield f"{name if percentile == 'p50' else '':21}{percentile:4}" + "".join(cells)
            if not found:
                break


class _Timer:
    def __init__(
        self, worker: Worker, inputs: Any, outputs: tuple[str, ...], graph: bool, events: list[int]
    ) -> None:
        self._worker, self._inputs, self._outputs, self._graph = worker, inputs, outputs, graph
        self._events = events
        self._cuda = worker.cuda

    def run(self) -> tuple[float, ...]:
        """Run once; returns the milliseconds of PHASES."""
        worker, stream = self._worker, self._worker.stream
        start, uploaded, computed, end = self._events
        began = time.perf_counter()
        worker.prepare(self._inputs)
        self._cuda.call("cudaEventRecord", start, stream)
        worker.upload()
        self._cuda.call("cudaEventRecord", uploaded, stream)
        enqueued = time.perf_counter()
        worker.compute(graph=self._graph)
        enqueue_ms = 1000 * (time.perf_counter() - enqueued)
        self._cuda.call("cudaEventRecord", computed, stream)
        worker.download(self._outputs)
        self._cuda.call("cudaEventRecord", end, stream)
        worker.mark()
        worker.wait()
        worker.results(self._outputs)
        end_to_end_ms = 1000 * (time.perf_counter() - began)
        between = [self._cuda.elapsed_ms(a, b) for a, b in itertools.pairwise(self._events)]
        return (enqueue_ms, *between, end_to_end_ms)


@contextlib.contextmanager
def _timer(
    session: TensorRTSession, images: np.ndarray, outputs: tuple[str, ...], graph: bool
) -> Iterator[_Timer]:
    with session.worker() as worker:
        held = Resources(session.cuda)
        try:
            events = [held.hold("cudaEventDestroy", session.cuda.event(timing=True)) for _ in range(4)]
            yield _Timer(worker, session.complete(images), outputs, graph, events)
        finally:
            held.close()
