"""Workers as actors of a Ray cluster, whose machines all see the inputs and the folder of results."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from deploy.batch.parts import Part
from deploy.batch.work import Done, Job, Worker
from runtime.errors import EngineError, OptionError

_REACH_SECONDS = 10.0


class _Actor:
    """A worker as Ray Data calls it: with a batch of one part, as columns."""

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [asdict(self._worker.do(Part.from_json(text))) for text in batch["part"]]
        return {name: [each[name] for each in done] for name in done[0]}


def run(job: Job, parts: Sequence[Part], address: str, workers: int | None) -> Iterator[Done]:
    """Do parts on a cluster, one CPU a worker; yield as they are done.

    Ray starts a dead actor anew and gives its part to one that lives; a result that is there is not made again.

    Args:
        job: what workers are given.
        parts: to do.
        address: of the cluster, as `ray.init` takes it: "auto", "local", "ray://HOST:10001".
        workers: actors; None takes one for every CPU of the cluster.

    Raises:
        OptionError: Ray is not installed.
        EngineError: the cluster is not reached.
    """
    try:
        import ray
    except ImportError:
        raise OptionError("--ray needs Ray; pip install 'clearpact[ray]'") from None
    _check_reachable(address)
    try:
        ray.init(address=address, num_cpus=workers if address == "local" else None, log_to_driver=False,
                 logging_level="ERROR", ignore_reinit_error=True)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"--ray {address}: no cluster there ({str(error).splitlines()[0]}); start one with `ray start --head`"
        ) from None
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        count = workers or int(ray.cluster_resources().get("CPU", 1))
        todo = ray.data.from_items([{"part": part.to_json()} for part in parts], override_num_blocks=len(parts))
        pool = ray.data.ActorPoolStrategy(size=min(count, len(parts)))
        done = todo.map_batches(_Actor, fn_constructor_args=(job,), batch_size=1, compute=pool, num_cpus=1)
        for row in done.iter_rows():
            yield Done(
                int(row["images"]), int(row["unreadable"]), float(row["cpu_seconds"]),
                float(row["start_cpu_seconds"]),
            )  # fmt: skip
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise EngineError now where nobody listens: Ray would try for five minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():  # "auto" and "local"
        return
    try:
        with socket.create_connection((host, int(port)), timeout=_REACH_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"--ray {address}: no cluster there ({error}); start one with `ray start --head`"
        ) from None
