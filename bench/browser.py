"""`python -m bench.browser PAGE`: latency of a page of `deploy.web` in Chromium, beside ONNX Runtime here.

Class, and class with map, of the same file, each on one thread and in turns: some runs in the browser, as many
here. A browser tells the time to a tenth of a millisecond only, so a sample is the mean of several runs.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.browser")

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import record
from bench.measure.chromium import RUNS, milliseconds, opened
from bench.measure.environment import describe, environment
from bench.measure.ratios import ratio
from bench.measure.statistics import summarize
from runtime import command
from runtime.errors import FileError
from runtime.session import Session, open_session

EXAMPLES = """
  python -m deploy.web model.onnx -o page && python -m bench.browser page
  python -m bench.browser page --record bench/results/cpu.jsonl
"""

_WARM_UPS = 5  # untimed samples of each: the browser compiles what runs often once more


def measure(session: Session, page: Any, rounds: int) -> dict[str, np.ndarray]:
    """Return what is timed and where -> mean milliseconds of some runs float64 [rounds], measured in turns.

    Args:
        session: the page's model on ONNX Runtime.
        page: from `bench.measure.chromium.opened`.
        rounds: samples of each.
    """
    shape = (1, *session.manifest.input.size, session.manifest.input.channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    target = np.full(1, -1, np.int64)
    kinds = {"class": ("logits",)} | (
        {"class and map": ("logits", "gradient")} if len(session.outputs) > 1 else {}
    )
    samples = {f"{kind}, {where}": np.empty(rounds) for kind in kinds for where in ("browser", "native")}
    for index in range(-_WARM_UPS, rounds):
        for kind, outputs in kinds.items():
            taken = milliseconds(page, image, explain=len(outputs) > 1)
            given: dict[str, np.ndarray] = {"image": image}
            if len(outputs) > 1:
                given["target"] = target
            session.run(given, outputs)
            began = time.perf_counter()
            for _ in range(RUNS):
                session.run(given, outputs)
            if index >= 0:
                samples[f"{kind}, browser"][index] = taken
                samples[f"{kind}, native"][index] = 1000 * (time.perf_counter() - began) / RUNS
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    """Print median times in the browser and here, and their ratio."""
    parser = command.parser("bench.browser", "Measure a page of deploy.web in Chromium.", EXAMPLES)
    parser.add_argument("page", type=Path, help="folder that python -m deploy.web wrote")
    parser.add_argument("--rounds", type=int, default=40, help="samples of each, in an instance (default: 40)")
    parser.add_argument("--instances", type=int, default=8,
                        help="browsers, and sessions; from 5 on, with intervals (default: 8)")  # fmt: skip
    record.add_options(parser)
    options = parser.parse_args(argv)
    command.check_counts(options, rounds=2, instances=1)
    if not (options.page / "model.json").is_file():
        raise FileError(f"{options.page}: no page; write one with python -m deploy.web")
    record.check(options, inputs=[options.page])
    samples: dict[str, list[np.ndarray]] = {}
    for _ in command.progress(range(options.instances), label="instances"):
        session = open_session(options.page / "model.onnx", engine="ort", threads=1)
        try:
            with opened(options.page) as page:
                version = page.context.browser.version
                for name, times in measure(session, page, options.rounds).items():
                    samples.setdefault(name, []).append(times)
        finally:
            session.close()
    kinds = dict.fromkeys(name.partition(", ")[0] for name in samples)
    where = environment()
    ratios = {kind: ratio(samples[f"{kind}, browser"], samples[f"{kind}, native"]) for kind in kinds}
    result = {
        "bench": "browser",
        "arch": session.manifest.arch,
        "data": session.manifest.data,
        "precision": session.manifest.precision,
        "engine": f"{session.engine} {session.version}",
        "browser": f"Chromium {version}",
        "runtime": json.loads((options.page / "model.json").read_text())["runtime"]["version"],
        "threads": 1,
        "instances": options.instances,
        "latency": {name: asdict(summarize(np.concatenate(each))) for name, each in samples.items()},
        "ratio": {kind: asdict(each) for kind, each in ratios.items()},
        "environment": where,
    }
    if record.deliver(options, result):
        return
    print(
        f"{session.manifest.arch}, {result['browser']}, ONNX Runtime Web {result['runtime']}; {result['engine']}"
    )
    for kind, each in ratios.items():
        medians = [float(np.median(np.concatenate(samples[f"{kind}, {name}"]))) for name in ("browser", "native")]
        print(f"{kind:15}{medians[0]:8.2f} ms in the browser{medians[1]:8.2f} ms here"
              f"   {each.told(1)} times")  # fmt: skip
    print(describe(where))


if __name__ == "__main__":
    command.run(main)
