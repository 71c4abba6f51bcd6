"""`python -m bench.processes.killed`: does a training run that is killed at random moments end as one that is not.

A run on some images of a data set is trained once without a kill. The same run is then started, killed by SIGKILL,
which no program can catch, after a random time, and resumed, until it has been killed as often as asked for; where
it ends before, it begins again. Parameters, the optimizer's state, what the method learned and the history of
every such run must equal those of the first, bit for bit.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.processes.killed")

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measure import record
from bench.measure.environment import describe, environment
from runtime import command
from runtime.errors import TrainingError
from train.choices import ARCHITECTURES, METHODS, QUANTIZED_BITS
from train.data import names
from train.data.splits import sources_of

if TYPE_CHECKING:
    from train.data.images import ImageData

EXAMPLES = """
  python -m bench.processes.killed --data digits --arch cnn2 --kills 5 --images 500
  python -m bench.processes.killed --data cifar10 --kills 100 --record bench/results/training.jsonl
"""

# A process may live until it has trained its first epoch and this many more.
_OTHER_EPOCHS = 1.5


def main(argv: Sequence[str] | None = None) -> None:
    """Print how often runs were killed, when, and that they ended as the one that was not.

    Raises:
        TrainingError: a run ended otherwise.
    """
    parser = command.parser(
        "bench.processes.killed", "Kill training runs at random moments and resume them.", EXAMPLES
    )
    parser.add_argument("--data", type=names.check_name, default="cifar10", help=f"{names.EXPECTED}")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--images", type=int, default=256, help="training images (default: 256)")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet20", help="default: resnet20")
    parser.add_argument("--bits", type=int, choices=QUANTIZED_BITS, default=4, help="default: 4")
    parser.add_argument("--method", choices=METHODS, default="smoot", help="default: smoot")
    parser.add_argument("--epochs", type=int, default=40, help="of a run (default: 40)")
    parser.add_argument("--kills", type=int, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    record.add_options(parser)
    options = parser.parse_args(argv)
    command.check_counts(options, images=100, epochs=2, kills=1)
    record.check(options, inputs=sources_of(options.data, options.data_root))
    # torch takes seconds to import: --help does without
    from bench.measure.kills import Kill, differences, run_killed, run_straight, tensor_count
    from train.data import datasets

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        command.status("reading the images")
        images = datasets.load(options.data, options.data_root)
        size = _write_folder(images, Path(place, "images"), options.images)
        arguments = [
            "--data", f"folder:{place}/images", "--image-size", str(size), "--arch", options.arch,
            "--bits", str(options.bits), "--method", options.method, "--epochs", str(options.epochs),
            "--batch-size", "64", "--flip", "--crop-padding", "2", "--workers", "0",
        ]  # fmt: skip
        command.status("a run without a kill")
        straight, first_s, epoch_s = run_straight(arguments, Path(place, "straight"))
        kills, runs = list[Kill](), 0
        bar = iter(command.progress(range(options.kills), label="kills"))
        while len(kills) < options.kills:
            ended, more = run_killed(
                arguments, Path(place, f"killed{runs}"), kills=options.kills - len(kills),
                longest_s=first_s + _OTHER_EPOCHS * epoch_s, seed=options.seed + runs, on_kill=lambda: next(bar),
            )  # fmt: skip
            kills, runs = kills + more, runs + 1
            if different := differences(straight, ended):
                raise TrainingError(
                    f"run {runs}, killed {len(more)} times: {len(different)} of {tensor_count(straight)} tensors "
                    f"differ from those of the run that was not, such as {different[0]}"
                )
    where = environment()
    result = {
        "bench": "killed runs", "data": options.data, "images": options.images, "arch": options.arch,
        "bits": options.bits, "method": options.method, "epochs": options.epochs, "seed": options.seed,
        "kills": len(kills), "runs": runs, "tensors_equal": tensor_count(straight),
        "first_epoch_s": first_s, "epoch_s": epoch_s, "seconds": time.perf_counter() - began,
        "after_an_epoch_of_its_own": sum(kill.trained for kill in kills),
        "half_written": sum(kill.half_written for kill in kills),
        "moments": [asdict(kill) for kill in kills], "environment": where,
    }  # fmt: skip
    if record.deliver(options, result):
        return
    print(f"{options.arch}, {options.bits} bits, {options.method}, {options.images:,} images of {options.data}, "
          f"{options.epochs} epochs of {epoch_s:.1f} s, {first_s:.1f} s to the end of the first")  # fmt: skip
    print(f"{len(kills)} kills in {runs} run{'s' * (runs > 1)}, after {min(k.seconds for k in kills):.1f} to "
          f"{max(k.seconds for k in kills):.1f} s; {result['after_an_epoch_of_its_own']} after an epoch of the "
          f"process's own, {result['half_written']} left a half-written file")  # fmt: skip
    print(f"equal, bit for bit: all {result['tensors_equal']} tensors of parameters, optimizer and method, "
          "and the history")  # fmt: skip
    print(describe(where))


def _write_folder(images: ImageData, folder: Path, count: int) -> int:
    """Write `count` training images, and a quarter as many test images, as a folder of PNGs; return their side."""
    from PIL import Image

    parts = (("train", images.train_images, images.train_labels, count),
             ("test", images.test_images, images.test_labels, count // 4))  # fmt: skip
    for part, pixels, labels, wanted in parts:
        for label in range(len(images.classes)):
            (folder / part / f"{label:03}").mkdir(parents=True)
        for number, pixel in enumerate(pixels[: min(wanted, len(pixels))]):
            picture = pixel.expand(3, -1, -1).permute(1, 2, 0).numpy()
            Image.fromarray(picture).save(folder / part / f"{int(labels[number]):03}" / f"{number:06}.png")
    return images.train_images.shape[-1]


if __name__ == "__main__":
    command.run(main)
