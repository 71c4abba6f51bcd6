"""`python -m bench.targets CKPT`: what each target computes of the same checkpoint: classes, codes, maps and time.

ONNX Runtime on x86 is compared with the same file run operator by operator as it is written, whose codes export
has held to the checkpoint's. What the others compute is compared with ONNX Runtime on x86: OpenVINO of the file
that is exported for it, whose gradient may be in codes; a browser of ONNX Runtime's file, in WebAssembly. Codes
are outputs there, which an app's file does not give, so times are of files without them: class and map, one
thread, in turns.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.targets")

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bench.measure import record
from bench.measure.chromium import milliseconds, opened, run_all
from bench.measure.environment import describe, environment
from bench.measure.statistics import measure
from bench.networks.codes import Differences, differences, with_codes
from export.reference import reference_run
from runtime import command
from runtime.errors import EngineError
from runtime.session import Session, open_session
from train.models import factory

EXAMPLES = """
  python -m bench.targets deploy/models/mnist-cnn2-8bit-sgt.pt
  python -m bench.targets runs/mnist/ckpt.pt --browser --plan --record bench/results/cpu.jsonl
  python -m bench.targets runs/mine/ckpt.pt --arch my_project.nets:small_net    # of your own network
"""

ENGINES = {"ort": "ONNX Runtime, x86", "openvino": "OpenVINO, x86"}
BROWSER = "browser, WebAssembly"
_AT_ONCE = 20  # images whose codes are held
_BROWSER_SAMPLES = 20
_TIMED_OUTPUTS = ("logits", "gradient")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each target."""
    parser = command.parser("bench.targets", "Compare what each target computes of a checkpoint.", EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="ckpt.pt of python -m train")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, default=200, help="first ones of the test split (default: 200)")
    parser.add_argument("--browser", action="store_true", help="a page of deploy.web in Chromium as well")
    parser.add_argument("--plan", action="store_true", help="build a plan of TensorRT-RTX ahead of time as well")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring each target (default: 3)")
    factory.add_option(parser)
    record.add_options(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    command.check_counts(options, images=1)
    record.check(options, inputs=[options.checkpoint])
    # torch takes seconds to import: --help does without
    from export.pipeline import export
    from train import checkpoint as checkpoints
    from train.data import datasets

    checkpoint = checkpoints.load(options.checkpoint)
    data = datasets.load(checkpoint.recipe.data_name, options.data_root)
    images = data.test_images[: options.images].permute(0, 2, 3, 1).contiguous().numpy()
    command.status("exporting")
    files = {engine: export(checkpoint, target=engine).data for engine in ENGINES}
    probed, names = with_codes(files["ort"])
    outputs = ("logits", "saliency", *names)
    reference, _ = reference_run(onnx.load_from_string(probed))
    expected = _in_parts(images, lambda part: reference(_feeds(part)))
    targets = {}
    for engine, title in ENGINES.items():  # ONNX Runtime first: the next is compared with it
        command.status(f"running {title}")
        its_file, its_names = with_codes(files[engine])
        session = open_session(its_file, engine=engine, threads=1)
        found = _in_parts(images, _runner(session, ("logits", "saliency", *its_names)))
        session.close()
        targets[title] = differences(expected, found)
        if engine == "ort":
            expected = found
    with tempfile.TemporaryDirectory() as folder:
        in_browser: list[float] = []
        if options.browser:
            command.status(f"running {BROWSER}")
            with opened(_page(probed, Path(folder), "codes")) as page:
                found = _in_parts(images, lambda part: run_all(page, part, outputs))
            targets[BROWSER] = differences(expected, found)
        times = _times(files, images[:1], options.seconds)
        if options.browser:
            with opened(_page(files["ort"], Path(folder), "plain")) as page:
                in_browser = [milliseconds(page, images[0], explain=True) for _ in range(_BROWSER_SAMPLES)]
            times[BROWSER] = float(np.median(in_browser))
        plan = _plan(options.checkpoint, options.arch, Path(folder)) if options.plan else None
    command.status("")
    where = environment()
    result = {
        "bench": "targets",
        "model": options.checkpoint.stem,
        "arch": checkpoint.arch["name"],
        "data": data.name,
        "targets": {title: {**asdict(row), "latency_p50_ms": times[title]} for title, row in targets.items()},
        "plan": plan,
        "environment": where,
    }
    if record.deliver(options, result):
        return
    print(f"{options.checkpoint}, {len(images)} images of {data.name}")
    print(f"{'':22}classes equal  codes moved  step  images    logits, equal    map, equal        ms")
    for title, row in targets.items():
        print(_line(title, row, times[title]))
    if plan:
        print(f"TensorRT-RTX {plan['version']}, ahead of time: built ({plan['bytes'] / 1e6:.1f} MB), not run")
    print(describe(where))


def _line(title: str, row: Differences, time_ms: float) -> str:
    return (
        f"{title:22}{row.images - row.classes_differing:13}{row.codes_moved:13,}{row.largest_step:6}"
        f"{row.images_with_moved_codes:8}{row.logits:10.0e}{_or_dash(row.logits_of_equal_codes):>7}"
        f"{row.map:8.0e}{_or_dash(row.map_of_equal_codes):>7}{time_ms:10.2f}"
    )


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _feeds(images: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": images, "target": np.full(len(images), -1, np.int64)}


def _runner(session: Session, outputs: tuple[str, ...]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return lambda part: session.run(_feeds(part), outputs)


def _in_parts(images: np.ndarray, run: Callable[[np.ndarray], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the outputs of all images, a few run at a time."""
    parts = [run(images[start : start + _AT_ONCE]) for start in range(0, len(images), _AT_ONCE)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _times(files: dict[str, bytes], image: np.ndarray, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of class and map on every engine here, measured in turns."""
    sessions = {ENGINES[engine]: open_session(data, engine=engine, threads=1) for engine, data in files.items()}
    runs = {title: _runner(session, _TIMED_OUTPUTS) for title, session in sessions.items()}
    contenders = {title: (lambda run=run: run(image)) for title, run in runs.items()}
    samples = measure(contenders, seconds=seconds)
    for session in sessions.values():
        session.close()
    return {title: float(np.median(each)) for title, each in samples.items()}


def _page(model: bytes, folder: Path, name: str) -> Path:
    """Return the folder of a page of a file, written by the command as a user does."""
    (folder / f"{name}.onnx").write_bytes(model)
    _run("deploy.web", folder / f"{name}.onnx", "-o", folder / name, "--no-webgpu")
    return folder / name


def _plan(checkpoint: Path, factories: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return version, bytes and INT8 layers of a plan that TensorRT-RTX builds of a checkpoint, without a GPU."""
    named = [word for name in factories for word in ("--arch", name)]
    plan = folder / "engine.plan"
    _run("export.engine", checkpoint.resolve(), "-o", plan, "--builder", "tensorrt_rtx", *named)
    sidecar = json.loads((folder / "engine.plan.json").read_text())
    return {
        "version": sidecar["builder_version"],
        "bytes": (folder / "engine.plan").stat().st_size,
        "int8_layers": len(sidecar["int8_layers"]),
    }


def _run(module: str, *arguments: object) -> None:
    given = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{module}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


if __name__ == "__main__":
    command.run(main)
