"""Every contender on one checkpoint: latency in turns and in fresh processes, cold start, accuracy, maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import data
from bench.measure.cold_start import Loading, in_turns
from bench.measure.environment import environment
from bench.measure.ratios import ratio
from bench.measure.statistics import SETTLE_MS, summarize
from bench.measure.streams import ImageStream, cores
from bench.networks.network import Network
from bench.peers.contenders import Contender, Found, contenders, explaining_networks
from bench.peers.explainers import explainers
from bench.peers.gpu_contenders import OURS_ON_GPU, gpu_contenders, gpu_explaining_networks, gpu_name
from bench.peers.gpu_explainers import gpu_explainers
from bench.peers.instances import Setting, times_of_instances
from bench.peers.names import OURS, OURS_WITH_MAP, PTQ
from bench.peers.qualities import map_qualities, qualities
from runtime import command
from runtime.errors import EngineError
from train.checkpoint import Checkpoint
from train.quantization.quantizers import activation_range

# Until the threads of the contender before have stopped spinning, mostly: see bench.measure.statistics.measure.
_REST_MS = 100.0
_WARM_UP_SECONDS = 0.5  # of each contender, in each instance


def test_images(options: Any, checkpoint: Checkpoint) -> ImageStream:
    """Return the test images of --data at the checkpoint's size; raise OptionError where they do not fit it."""
    test = data.stream(
        options.data, options.data_root,
        size=checkpoint.input.size, classes=checkpoint.classes, trained_on=checkpoint.recipe.data_name,
    )  # fmt: skip
    data.check_fits(test, checkpoint.input.size, checkpoint.input.channels, len(checkpoint.classes))
    return test


def compared(
    options: Any, checkpoint: Checkpoint, batches: Sequence[int], test: ImageStream | None, folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield the result of each batch size; what does not depend on it is in all of them."""
    size = (*checkpoint.input.size, checkpoint.input.channels)
    command.status("preparing the contenders ...")
    found: Found[Contender] = Found({}, {})
    if not options.explain:
        found = contenders(checkpoint, folder, threads=options.threads, peers=not options.no_peers)
        if options.only_ptq:
            asked = {*PTQ, *PTQ.values()}
            ready = {name: one for name, one in found.ready.items() if name in asked}
            found = Found(ready, {name: reason for name, reason in found.missing.items() if name in asked})
        else:
            found |= gpu_contenders(
                checkpoint, folder, batches=batches, threads=options.threads, peers=not options.no_peers
            )
    command.status("")
    latencies = {batch: _latency(options, checkpoint, (batch, *size), found, folder) for batch in batches}
    loadings = {name: contender.loading for name, contender in found.ready.items()} if options.starts else {}
    starts = in_turns(loadings, shape=size, threads=options.threads, starts=options.starts)
    quality = qualities(found.ready, test, len(checkpoint.classes)) if test is not None else {}
    maps, networks = {}, Found[Network]({}, {})
    if test is not None:
        networks = Found(explaining_networks(checkpoint, folder, workers=cores()), {})
        if OURS_ON_GPU in found.ready:
            networks |= gpu_explaining_networks(checkpoint, folder)
        some = test.evenly_spaced(min(options.map_images, len(test.labels)))
        maps = map_qualities(networks.ready, some, workers=cores())
    where = environment()
    with contextlib.suppress(EngineError):
        where["gpu"] = gpu_name()
    for latency in latencies.values():
        yield latency | {
            "file_bytes": {name: contender.file_bytes for name, contender in found.ready.items()},
            "starts": options.starts,
            "first_prediction": {
                name: {"cold_start_ms": found.first_prediction_ms, "peak_memory_bytes": found.peak_memory_bytes}
                for name, found in starts.items()
            },
            "data": test.name if test is not None else None,
            "quality": {name: asdict(value) for name, value in quality.items()},
            "map_images": options.map_images if maps else None,
            "maps": {name: asdict(value) for name, value in maps.items()},
            "missing": latency["missing"] | networks.missing,
            "environment": where,
        }


def _latency(
    options: Any, checkpoint: Checkpoint, shape: tuple[int, ...], found: Found[Contender], folder: Path
) -> dict[str, Any]:
    if options.explain:
        loadings = explainers(checkpoint, folder) | gpu_explainers(
            checkpoint, shape[0], folder, threads=options.threads, peers=not options.no_peers
        )
    else:
        ready = {name: contender.loading_of(shape[0]) for name, contender in found.ready.items()}
        loadings = Found[Loading](ready, found.missing)
    ours = OURS_WITH_MAP if options.explain else OURS
    setting = Setting(
        shape=shape,
        threads=options.threads,
        seconds=options.seconds / options.instances,
        warm_up_seconds=min(_WARM_UP_SECONDS, options.seconds),
        rest_ms=_REST_MS if options.threads > 1 else 0.0,
    )
    times = times_of_instances(loadings.ready, setting, instances=options.instances)
    return {
        "bench": "compare-explain" if options.explain else "compare",
        "arch": checkpoint.arch["name"],
        "bits": checkpoint.quant.bits,
        "grid": _grid(checkpoint),
        "trained_on": checkpoint.recipe.data_name,
        "input": list(shape),
        "threads": options.threads,
        "only_ptq": options.only_ptq,
        "instances": options.instances,
        "warm_up_seconds": setting.warm_up_seconds,
        "settle_ms": SETTLE_MS,
        "rest_ms": setting.rest_ms,
        "latency": {name: asdict(summarize(np.concatenate(each))) for name, each in times.items()},
        f"ratio_to_{ours}": {name: asdict(ratio(each, times[ours])) for name, each in times.items()},
        "ratio_to_ptq": {
            name: asdict(ratio(times[name], times[ptq])) for name, ptq in PTQ.items() if {name, ptq} <= set(times)
        },
        "missing": loadings.missing,
    }


def _grid(checkpoint: Checkpoint) -> str:
    """Return the codes of the activations, such as "0..127", and whether what is added is on grids, too."""
    quant = checkpoint.quant
    _, qmax = activation_range(quant.bits, full_range=quant.full_range)
    return f"0..{qmax}{', addends' if quant.quantize_adds else ''}"
