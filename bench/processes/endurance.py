"""`python -m bench.processes.endurance`: does `bench.saliency` end on a million images, and in how much memory.

The images of a data set are repeated, each time with other noise, in a file that is read as it is measured.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.processes.endurance")

import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from bench import saliency
from bench.measure import record
from bench.measure.data import HELP, LabelledImages, collected
from bench.measure.environment import describe, environment
from bench.measure.streams import in_npz, watched
from bench.networks.network import find
from bench.networks.opened import open_networks, stream_for
from runtime import command
from runtime.classifier import MAX_BATCH
from runtime.session import ENGINES
from train.data.splits import sources_of

EXAMPLES = """
  python -m bench.processes.endurance ckpt.onnx --data digits
  python -m bench.processes.endurance ckpt.onnx --data mnist --images 100000 --threads 2
  python -m bench.processes.endurance ckpt.onnx --data digits --record bench/results/explanations.jsonl
"""

_NOISE_LEVELS = 8
_FEWEST_IMAGES = 1000  # before, memory is still being taken for the first time


def write_repeated(path: Path, given: LabelledImages, count: int) -> None:
    """Write `count` images, the given ones again and again, as a file for `bench.measure.streams.in_npz`.

    Each repetition has noise of its own, up to 7 grey levels, from a generator that the images' numbers seed.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *given.shape)}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, header)
            starts = range(0, count, MAX_BATCH)
            for start in command.progress(starts, label="writing images / 64"):
                numbers = np.arange(start, min(start + MAX_BATCH, count))
                images = given.images[numbers % len(given.images)]
                noise = np.random.default_rng(start).integers(0, _NOISE_LEVELS, images.shape, np.uint8)
                member.write((images ^ noise).tobytes())
        with archive.open("labels.npy", "w", force_zip64=True) as member:
            npy.write_array(member, given.labels[np.arange(count) % len(given.labels)])


def main(argv: Sequence[str] | None = None) -> None:
    """Print how much memory so many images took, and what was measured on them."""
    parser = command.parser(
        "bench.processes.endurance", "Measure maps of a million images, and the memory.", EXAMPLES
    )
    parser.add_argument("model", help="exported .onnx, ckpt.pt or run folder")
    parser.add_argument("--data", required=True, help=HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="of .onnx files (default: as exported)")
    parser.add_argument("--threads", type=int, default=1, help="batches at the same time (default: 1)")
    record.add_options(parser)
    options = parser.parse_args(argv)
    command.check_counts(options, images=_FEWEST_IMAGES, threads=1)
    record.check(options, inputs=[find(options.model), *sources_of(options.data, options.data_root)])
    networks = open_networks(options.model, engine=options.engine, threads=1, parallel_runs=options.threads)
    given = collected(stream_for(networks, options.data, options.data_root))
    peaks: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "repeated.npz")
        write_repeated(path, given, options.images)
        began = time.perf_counter()
        (sums,), _ = saliency.measure(networks, watched(in_npz(path), peaks), fill="black", canvas="blur",
                                      target="predicted", workers=options.threads)  # fmt: skip
        seconds = time.perf_counter() - began
    (network,), where = networks, environment()
    early = min(10_000, options.images // 10)
    grown = peaks[options.images] - next(peak for images, peak in peaks.items() if images >= early)
    result = {
        "bench": "endurance", "data": given.name, "n": sums.images, "threads": options.threads,
        "network": saliency.summarize(network, sums), "seconds": seconds,
        "peak_memory_bytes_after_images": peaks, "grown_bytes": grown, "environment": where,
    }  # fmt: skip
    if record.deliver(options, result):
        return
    print(f"{network.name}: {sums.images:,} images of {given.name}, repeated with noise, in {seconds:,.0f} s; "
          f"accuracy {result['network']['accuracy']:.2f} %")  # fmt: skip
    print("images         peak memory, MiB")
    for images, peak in peaks.items():
        print(f"{images:<13,}{peak / 2**20:18,.1f}")
    print(f"grown since {early:,} images: {grown / 2**20:.1f} MiB")
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
