"""`python -m bench.sanity`: do maps change when the network's weights become random, layer by layer?"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.sanity")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import record
from bench.measure.data import HELP
from bench.measure.environment import describe, environment
from bench.networks.methods import ALL, Method, methods_of
from bench.networks.network import find
from bench.networks.opened import open_networks, stream_for
from bench.networks.randomized import layers_from_the_head, randomized
from runtime import command
from runtime.classifier import Classifier
from runtime.errors import OptionError
from runtime.explanations.agreement import spearman, ssim
from runtime.files import read_bytes
from train.data.splits import sources_of
from train.models import factory

EXAMPLES = """
  python -m bench.sanity ckpt.onnx --data mnist
  python -m bench.sanity runs/mnist-cnn2-8bit-sgt/ckpt.pt --data mnist --images 128
  python -m bench.sanity ckpt.onnx --data cifar10 --method gradient,gradcam --stages 5
"""

# A map that still agrees so much with all weights random shows the image, and not what the network learned.
FAILS_ABOVE = 0.5
_MEASURES = {"spearman": spearman, "ssim": ssim}


def measure(
    data: bytes, images: np.ndarray, asked: str, *, stages: int, seed: int = 0
) -> tuple[tuple[Method, ...], list[dict[str, Any]]]:
    """Return the methods, and after each stage how much their maps agree with those of the trained weights.

    The maps are of the class that the trained network predicts.

    Args:
        data: contents of an exported file.
        images: uint8 [N, H, W, C] of its size.
        asked: methods, see `bench.networks.methods.methods_of`.
        stages: steps from the head to the image, in which more and more layers are random.
        seed: of their order.
    """
    layers = layers_from_the_head(data)
    # The last stage has every layer.
    counts = np.unique(np.linspace(0, len(layers), min(stages, len(layers)) + 1).round().astype(int))
    methods: tuple[Method, ...] = ()
    first: dict[Method, np.ndarray] = {}
    target = np.zeros(0, np.int64)
    rows: list[dict[str, Any]] = []
    for count in command.progress(counts.tolist(), label="randomizing"):
        with Classifier(randomized(data, layers[:count], seed=seed), threads=1) as classifier:
            if not count:
                methods = methods_of(classifier.manifest, classifier.session.outputs, asked)
                target = classifier.logits(images).argmax(1)
            found = {
                method: classifier.explain(images, target, method=method.name, layer=method.layer).map
                for method in methods
            }
        if not count:
            first = found
            continue
        for method, maps in found.items():
            alike = {name: float(compared(maps, first[method]).mean()) for name, compared in _MEASURES.items()}
            rows.append({"method": str(method), "layers": int(count), "down_to": layers[count - 1].name, **alike})
    return methods, rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print how much the maps of each method still agree, the more layers are random."""
    parser = command.parser(
        "bench.sanity", "Check that maps depend on what the network learned (Adebayo et al. 2018).", EXAMPLES
    )
    parser.add_argument("model", help="exported .onnx, ckpt.pt or run folder")
    parser.add_argument("--data", required=True, help=HELP)
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, default=64, help="how many, evenly spaced (default: 64)")
    parser.add_argument("--method", default=ALL, help="all, or some of the file's methods (default: all)")
    parser.add_argument("--stages", type=int, default=6, help="steps from the head to the image (default: 6)")
    record.add_options(parser)
    factory.add_option(parser)
    options = parser.parse_args(argv)
    factory.allow(*options.arch)
    command.check_counts(options, images=1, stages=1)
    file = find(options.model)
    record.check(options, inputs=[file, *sources_of(options.data, options.data_root)])
    (network, *_) = open_networks(str(file), threads=1, classes_only=True)
    test = stream_for([network], options.data, options.data_root)
    test = test.evenly_spaced(min(options.images, len(test.positions)))
    network.close()
    images = np.concatenate([part for part, _ in test.batches()])
    methods, rows = measure(_exported(file), images, options.method, stages=options.stages)
    last = {row["method"]: row for row in rows}
    where = environment()
    result = {
        "bench": "sanity", "model": network.name, "precision": network.precision, "data": test.name,
        "n": len(images), "rows": rows,
        "passed": {name: row["spearman"] <= FAILS_ABOVE for name, row in last.items()},
        "environment": where,
    }  # fmt: skip
    if record.deliver(options, result):
        return
    of = f"{network.name}, {network.precision}, {len(images)} images of {test.name}"
    print(f"{of}: agreement with the maps of the trained weights")
    print(f"{'random layers, down to':34}" + "".join(f"{method!s:>26}" for method in methods))
    print(f"{'':34}" + f"{'Spearman    SSIM':>26}" * len(methods))
    for start in range(0, len(rows), len(methods)):
        line = rows[start : start + len(methods)]
        print(f"{line[0]['layers']:3} {line[0]['down_to'][:29]:30}"
              + "".join(f"{row['spearman']:18.3f}{row['ssim']:8.3f}" for row in line))  # fmt: skip
    for name, row in last.items():
        verdict = "changes with the weights" if row["spearman"] <= FAILS_ABOVE else "FAILS: shows the image"
        print(f"{name}: {verdict} (Spearman {row['spearman']:.3f} where all are random)")
    print(describe(where))


def _exported(file: Path) -> bytes:
    """Return the contents of an exported file; of a checkpoint, its export of the class alone."""
    if file.suffix != ".pt":
        return read_bytes(file)
    try:
        from export.pipeline import export
        from train import checkpoint as checkpoints
        from train.choices import FLOAT_BITS
    except ImportError as error:
        raise OptionError(f"{file}: a checkpoint needs {error.name}; pip install 'clearpact[export]'") from None
    checkpoint = checkpoints.load(file)
    command.status("exporting ...")
    data = export(checkpoint, int8=checkpoint.quant.bits != FLOAT_BITS, saliency=False).data
    command.status("")
    return data


if __name__ == "__main__":
    command.run(main)
