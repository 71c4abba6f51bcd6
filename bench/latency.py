"""`python -m bench.latency`: how long one exported model takes, and in which environment."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.latency")

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.layers import profile as layer_profile
from bench.measure import gpu_latency, power, record
from bench.measure.cold_start import ColdStart, Loading, in_turns
from bench.measure.environment import describe, environment, peak_memory_bytes
from bench.measure.parallel_requests import images_per_second
from bench.measure.session_latency import (
    contenders,
    frame_latency,
    maps_of,
    methods_of,
    random_images,
    session_latency,
)
from bench.measure.statistics import (
    batch_sizes,
    check_seconds,
    missing_percentiles,
    told,
)
from bench.measure.streams import cores
from bench.peers import benchmark_app
from runtime import command
from runtime.engines.tensorrt.session import TensorRTSession
from runtime.errors import OptionError
from runtime.session import ENGINES, Session, is_plan, open_session

EXAMPLES = """
  python -m bench.latency model.onnx
  python -m bench.latency model.onnx --batch 1,8,32 --threads 1
  python -m bench.latency model.onnx --explain               # class, and class with map, in turns
  python -m bench.latency model.onnx --explain --frame 1080x1920   # and from a camera's frame to the answer
  python -m bench.latency model.onnx --engine ort --json >> results.jsonl
  python -m bench.latency engine.plan --explain --streams 4  # phases, with and without CUDA graph
  python -m bench.latency engine.plan --profile --energy     # per layer; per image, in millijoules
  python -m bench.latency class_only.onnx --beside-benchmark-app     # its throughput by OpenVINO's own tool, too
  python -m bench.latency model.onnx --engine ort --device tensorrt
"""


def frame_size(text: str) -> tuple[int, int]:
    """Return height and width of a text such as "1080x1920".

    Raises:
        OptionError: it is another text.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise OptionError(f"--frame {text}: expected HEIGHTxWIDTH in pixels, such as 1080x1920")
    return int(height), int(width)


def main(argv: Sequence[str] | None = None) -> None:
    """Print latency per batch size, cold start and memory, for a person or as one JSON line."""
    parser = command.parser("bench.latency", "Measure the latency of an exported model.", EXAMPLES)
    parser.add_argument("model", help="ONNX file of python -m export.onnx, or plan of export.engine")
    parser.add_argument("--batch", default="1", help="batch sizes, comma-separated (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one inference (default: 1)")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the one the model was exported for")
    parser.add_argument("--device", help="default: cpu; cuda for a plan")
    parser.add_argument("--runs", type=int, help="runs to measure (default: as many as fit in --seconds)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per batch size (default: 3)")
    parser.add_argument("--explain", action="store_true", help="time the class with each of its maps too")
    parser.add_argument("--frame", metavar="HxW", help="also from an RGB frame of this size to the answer")
    parser.add_argument("--requests", type=int,
                        help="of the throughput, in parallel (default: cores by --threads; 0: none)")  # fmt: skip
    parser.add_argument("--beside-benchmark-app", action="store_true",
                        help="its throughput beside OpenVINO's own tool; of a file without maps")  # fmt: skip
    parser.add_argument("--spin", action="store_true", help="plans: wait for the GPU on a busy core, not asleep")
    parser.add_argument("--version-compatible", action="store_true", help="run the code that such a plan carries")
    parser.add_argument("--streams", type=int, help="plans: throughput with so many runs in flight")
    parser.add_argument("--profile", action="store_true", help="plans: time, precision, ONNX nodes of every layer")
    parser.add_argument(
        "--energy", action="store_true", help="power, and energy of an image, from the sensor of the GPU or CPU"
    )
    parser.add_argument("--no-cold-start", action="store_true", help="leave out the fresh processes")
    record.add_options(parser)
    options = parser.parse_args(argv)
    batches = batch_sizes(options.batch)
    command.check_counts(options, runs=1, requests=0, streams=1)
    check_seconds(options.seconds)
    frame = frame_size(options.frame) if options.frame else None
    record.check(options, inputs=[options.model])
    model = str(Path(options.model).resolve())
    session = _open(options)
    try:
        measured = {
            batch: session_latency(
                session, batch, explain=options.explain, runs=options.runs, seconds=options.seconds
            )
            for batch in batches
        }
        frames = (
            frame_latency(session, frame, explain=options.explain, runs=options.runs, seconds=options.seconds)
            if frame
            else {}
        )
        streams = _streams(session, batches, options)
        requests = _requests(session, options)
        throughput = _throughput(options, batches, requests)
        beside = _beside_tool(session, options, batches[0], requests) if options.beside_benchmark_app else None
        layers = _profile(session, batches[0]) if options.profile else None
        energy = _energy(session, batches[0], options) if options.energy else None
        cold = None if options.no_cold_start else _cold_start(model, session, options.threads)
    finally:
        session.close()
    where = environment()
    result = {
        "bench": "latency",
        "model": Path(options.model).name,
        "arch": session.manifest.arch,
        "precision": session.manifest.precision,
        "target": session.manifest.target,
        "data": session.manifest.data,
        "input": [*session.manifest.input.size, session.manifest.input.channels],
        "file_bytes": Path(options.model).stat().st_size,
        "engine": f"{session.engine} {session.version}",
        "device": session.device,
        "threads": options.threads,
        "latency": {
            str(batch): {name: asdict(row) for name, row in found.latency.items()}
            for batch, found in measured.items()
        },
        "maps": methods_of(session) if options.explain else {},
        "frame": frame,
        "frame_latency": {name: asdict(row) for name, row in frames.items()},
        "phases": {str(batch): found.phases for batch, found in measured.items()},
        "requests": requests,
        "throughput_images_per_second": throughput,
        "benchmark_app": asdict(beside) | {"batch": batches[0], "ratio": beside.ratio} if beside else None,
        "spin": options.spin,
        "plan": _built(session),
        "streams": streams,
        "layers": [asdict(layer) for layer in layers] if layers else None,
        "energy": {name: asdict(found) for name, found in energy.items()} if energy else None,
        "cold_start": asdict(cold) if cold else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "environment": where,
    }
    if record.deliver(options, result):
        return
    print(f"{options.model}  {session.manifest.precision} on {result['engine']}, {session.device}, "
          f"threads {options.threads}")  # fmt: skip
    width = max(12, *(len(name) for found in measured.values() for name in found.latency))
    print(f"batch {'':{width}}   p50 ms   p90 ms   p95 ms   p99 ms     ± ms   runs")
    for batch, found in measured.items():
        for name, row in found.latency.items():
            print(f"{batch:5} {name:{width}}{row.p50_ms:9.3f}{told(row.p90_ms):>9}{told(row.p95_ms):>9}"
                  f"{told(row.p99_ms):>9}{row.std_ms:9.3f}{row.n:7,}")  # fmt: skip
        if options.explain:
            for name in maps_of(session):
                ratio = found.latency[name].p50_ms / found.latency["class"].p50_ms
                map_name = name.removeprefix("class + ")
                print(f"      class and {map_name} together cost {ratio:.2f} times the class alone")
        if session.device != "cpu":
            print(*gpu_latency.table(found.phases), sep="\n")
        if str(batch) in throughput:
            print(f"      throughput, {requests} requests in parallel: {throughput[str(batch)]:,.0f} images/s")
        if str(batch) in streams:
            print(f"      {options.streams} streams: {streams[str(batch)]:,.0f} images/s")
    if beside:
        print(f"throughput, batch {batches[0]}: {beside.ratio:.2f} times benchmark_app's "
              f"{np.median(beside.tool):,.0f} images/s (in turns)")  # fmt: skip
    for name, row in frames.items():
        print(f"{options.frame:>9} {name:20} {row.p50_ms:9.3f} ms p50 {told(row.p90_ms):>9} p90 {row.n:7,} runs")
    counts = [row.n for found in measured.values() for row in found.latency.values()]
    for reason in missing_percentiles(counts):
        print(reason)
    if layers:
        print(*layer_profile.table(layers), sep="\n")
    for name, drawn in (energy or {}).items():
        print(f"{name:12} {drawn.millijoules_per_image:.3f} mJ an image, "
              f"{drawn.millijoules_per_image_above_idle:.3f} above idle "
              f"({drawn.watts:.1f} W, idle {drawn.idle_watts:.1f} W, {drawn.source})")  # fmt: skip
    if cold:
        print(f"cold start {cold.first_prediction_ms:.0f} ms to the first prediction "
              f"(import runtime {cold.import_ms:.0f} ms)")  # fmt: skip
    print(f"file {result['file_bytes']:,} bytes, peak memory {peak_memory_bytes() / 2**20:,.0f} MiB")
    print(describe(where))


def _cold_start(model: str, session: Session, threads: int | None, starts: int = 5) -> ColdStart:
    loading = Loading("runtime", Path(model), session.engine, session.device)
    image = session.manifest.input
    shape = (*image.size, image.channels)
    return in_turns({model: loading}, shape=shape, threads=threads, starts=starts)[model]


def _open(options: argparse.Namespace) -> Session:
    return open_session(
        options.model, engine=options.engine, device=options.device, threads=options.threads,
        options={"spin": options.spin} if is_plan(options.model) else None,
        version_compatible=options.version_compatible,
    )  # fmt: skip


def _requests(session: Session, options: argparse.Namespace) -> int:
    """Return how many requests of the throughput run in parallel; 0 measures none: GPUs have --streams."""
    if session.device != "cpu":
        return 0
    return max(1, cores() // options.threads) if options.requests is None else int(options.requests)


def _throughput(options: argparse.Namespace, batches: list[int], requests: int) -> dict[str, float]:
    """Return batch size -> images a second of a session made for so many requests at once."""
    if not requests:
        return {}
    session = open_session(
        options.model, engine=options.engine, device=options.device, threads=options.threads,
        parallel_runs=requests,
    )  # fmt: skip
    try:
        return {
            str(batch): images_per_second(
                contenders(session, batch, explain=False)["class"],
                batch=batch, requests=requests, seconds=options.seconds,
            )
            for batch in batches
        }  # fmt: skip
    finally:
        session.close()


def _beside_tool(session: Session, options: argparse.Namespace, batch: int, requests: int) -> benchmark_app.Beside:
    """Return images a second of ours and of OpenVINO's own tool, in turns.

    Raises:
        OptionError: another engine, a file with maps, or no throughput asked for.
    """
    if session.engine != "openvino" or maps_of(session) or not requests:
        raise OptionError(
            "--beside-benchmark-app: the tool measures throughput on OpenVINO, of all outputs; expected "
            "--requests from 1, and a file of export.onnx --target openvino --no-saliency"
        )
    shape = random_images(session, batch).shape
    return benchmark_app.beside(
        lambda: _throughput(options, [batch], requests)[str(batch)],
        Path(options.model),
        shape,
        seconds=options.seconds,
    )


def _streams(session: Session, batches: list[int], options: argparse.Namespace) -> dict[str, float]:
    if options.streams is None:
        return {}
    first_map = list(maps_of(session).values())[:1] if options.explain else []
    plan, outputs = _plan(session, "--streams"), ("logits", *first_map)
    return {
        str(batch): gpu_latency.streams_images_per_second(
            plan, random_images(session, batch), outputs, streams=options.streams, seconds=options.seconds
        )
        for batch in batches
    }


def _profile(session: Session, batch: int) -> list[layer_profile.Layer]:
    return layer_profile.profile(_plan(session, "--profile"), random_images(session, batch))


def _energy(session: Session, batch: int, options: argparse.Namespace) -> dict[str, power.Energy]:
    number = session.device.partition(":")[2]
    with power.open_meter(None if session.device == "cpu" else int(number or 0)) as meter:
        return {
            name: power.measure_energy(
                call, batch, meter, seconds=options.seconds, idle_seconds=min(2.0, options.seconds)
            )
            for name, call in contenders(session, batch, explain=options.explain).items()
        }


def _built(session: Session) -> dict[str, str] | None:
    """Return what a plan was built with and for, without which its times mean nothing; None for an ONNX file."""
    if not isinstance(session, TensorRTSession):
        return None
    names = ("label", "device", "compute_capability", "driver", "onnx_sha256")
    return {name: getattr(session.sidecar, name) for name in names}


def _plan(session: Session, option: str) -> TensorRTSession:
    if isinstance(session, TensorRTSession):
        return session
    raise OptionError(f"{option}: {session.engine} does not show that; build a plan: python -m export.engine")


if __name__ == "__main__":
    command.run(main)
