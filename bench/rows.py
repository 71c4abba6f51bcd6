"""`python -m bench.rows`: train the rows of a table of results in turn, each resumed where it stopped."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m bench.rows")

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.evidence.cards import card
from bench.measure import record
from bench.measure.environment import describe, environment
from runtime import command
from runtime.errors import OptionError
from runtime.files import read_bytes, write_atomically
from train import __main__ as train
from train.choices import CHECKPOINT_NAME, STEP_PRECISIONS
from train.models import factory

if TYPE_CHECKING:
    from train.checkpoint import Checkpoint

_MASKED = "mask_percent_"  # min, median and max of smoot's K over the training images
_SHIPPED = (".pt", ".md")  # what is written of a row into the folder of --ship
RESULTS = Path(__file__).parent / "results"

EXAMPLES = """
  python -m bench.rows cifar10 --device cuda --data-root data     # float, 8 to 2 bits
  python -m bench.rows cifar10 --only cifar10-resnet20-2bit-sgt   # one of them; those it starts from first
  python -m bench.rows deit --device cuda --data-root data        # a transformer: plain, sgt, smoot
  python -m bench.rows mnist --record bench/results/training.jsonl --ship deploy/models
"""


def _file(runs: Path, row: str) -> str:
    """Return the checkpoint of a row below the folder `runs`, or the file itself."""
    return row if row.endswith(".pt") else str(runs / row / CHECKPOINT_NAME)


@dataclass(frozen=True)
class Row:
    """One run of a table.

    Args:
        name: of the run's folder.
        options: of `python -m train`.
        asked: accuracy on the test split that the run is to reach, in percent; None where it is a step to others.
        init: name of the row whose parameters it starts from, or a file of this repository.
        teacher: name of the row whose probabilities it learns, or such a file.
    """

    name: str
    options: str
    asked: float | None = None
    init: str = ""
    teacher: str = ""

    def arguments(self, runs: Path) -> list[str]:
        """Return the command line of `python -m train` that starts the run below the folder `runs`."""
        given = ["--runs", str(runs), "--name", self.name, *shlex.split(self.options)]
        for option, row in (("--init", self.init), ("--teacher", self.teacher)):
            given += [option, _file(runs, row)] if row else []
        return given

    def own_network(self) -> list[str]:
        """Return the option that allows to run the row's own factory, where it has one."""
        words = shlex.split(self.options)
        named = [word for word in words if factory.is_factory(word) and words[words.index(word) - 1] == "--arch"]
        return [word for name in named for word in ("--arch", name)]


_DIGITS = "--data digits --arch cnn2"
_SEEDS = (0, 1, 2)
# From scratch, on CIFAR-10 alone, in 8 bits. The published rows (95.65, 96.05 and 96.35 %) are in float, and their
# paper does not say where the network started: what can be compared is the order.
_DEIT = ("--data cifar10 --arch deit_tiny --bits 8 --epochs 200 --batch-size 256 --optimizer adamw --lr 1e-3 "
         "--weight-decay 0.05 --alpha-decay 0 --label-smoothing 0.1 --crop-padding 4 --flip "
         "--precision bfloat16")  # fmt: skip


def _of_every_method(data: str) -> tuple[Row, ...]:
    """Return short runs that differ in method and seed alone, whose maps bench.saliency compares."""
    options = f"--data {data} --arch cnn2 --bits 8 --precision bfloat16 --epochs 4 --kl-weight 1"
    return tuple(
        Row(f"{data}-cnn2-8bit-{method}-seed{seed}", f"{options} --method {method} --seed {seed}")
        for seed in _SEEDS
        for method in ("plain", "sgt", "smoot")
    )


# ResNet-20 from scratch; 3,494 of 3,882 training images show pneumonia, so each class is drawn equally often.
_XRAYS = ("--data pneumoniamnist --arch resnet20 --balanced-sampling --crop-padding 3 --rotate-degrees 8 "
          "--zoom 0.1 --weight-decay 5e-4 --batch-size 64 --precision bfloat16")  # fmt: skip
_STEEL = ("--data folder:data/neu-128 --image-size 128 --test-share 0.2 --arch resnet20 --flip --crop-padding 8 "
          "--rotate-degrees 10 --zoom 0.1 --weight-decay 5e-4 --batch-size 32 --precision bfloat16")  # fmt: skip
# A user's own network with weights from ImageNet, docs/examples: half of it stays as it is.
_CALTECH = ("--data folder:data/cal/caltech101-128 --image-size 128 --test-share 0.2 "
            "--arch docs.examples.efficientnet_lite0:make --batch-size 32 --flip --crop-padding 8 --zoom 0.1 "
            "--weight-decay 1e-4 --label-smoothing 0.1")  # fmt: skip
_CALTECH_FLOAT = "caltech101-128-efficientnet_lite0-float-plain"


def _of_a_chest(seed: int) -> tuple[Row, ...]:
    """Return the rows of one seed: float, and from it 8 bits by every method."""
    start = f"pneumoniamnist-resnet20-float-plain-seed{seed}"
    methods = {"plain": "--lr 0.01", "sgt": "--lr 0.01 --kl-weight 0.05", "asg": ""}
    return (
        Row(start, f"{_XRAYS} --bits 32 --method plain --epochs 20 --lr 0.05 --seed {seed}"),
        *(
            Row(f"pneumoniamnist-resnet20-8bit-{method}-seed{seed}",
                f"{_XRAYS} --bits 8 --method {method} --epochs 6 {rates} --seed {seed}", init=start)
            for method, rates in methods.items()
        ),
    )  # fmt: skip


_CIFAR10 = "cifar10-resnet20-float-plain"
_FLOAT_FILE = "bench/checkpoints/cifar10-resnet20-float.pt"
_LAST_4BIT = ("--data cifar10 --arch resnet20 --bits 4 --weight-quantizer lsq --batch-size 256 "
              "--weight-decay 1e-4 --crop-padding 4 --flip --precision bfloat16 --validation 2500")  # fmt: skip


def _plain(bits: int) -> str:
    return f"cifar10-resnet20-{bits}bit-plain"


def _of_bits(bits: int, before: str, asked: float) -> tuple[Row, Row]:
    """Return the plain and the guided row of these bits; the plain one starts from the row `before`."""
    plain = Row(_plain(bits), f"--recipe clearpact-cifar10-{bits}bit-plain", init=before, teacher=_CIFAR10)
    guided = f"cifar10-resnet20-{bits}bit-sgt"
    return plain, Row(guided, f"--recipe clearpact-cifar10-{bits}bit", asked, init=plain.name, teacher=_CIFAR10)


TABLES = {
    "digits": (
        Row("digits-cnn2-float-plain", f"{_DIGITS} --bits 32 --method plain --flip"),
        Row("digits-cnn2-4bit-sgt", f"{_DIGITS} --bits 4 --weight-quantizer lsq --method sgt",
            init="digits-cnn2-float-plain", teacher="digits-cnn2-float-plain"),
    ),
    "mnist": (
        Row("mnist-cnn2-8bit-plain", "--recipe clearpact-mnist-plain"),
        Row("mnist-cnn2-8bit-sgt", "--recipe clearpact-mnist", asked=99.5, init="mnist-cnn2-8bit-plain"),
    ),
    # 4 bits from the file that is shipped.
    "mnist-4bit": (
        Row("mnist-cnn2-4bit-sgt", "--recipe clearpact-mnist --bits 4 --weight-quantizer lsq --epochs 2",
            asked=99.35, init="deploy/models/mnist-cnn2-8bit-sgt.pt"),
    ),
    "fashion-mnist": (
        Row("fashion-mnist-cnn2-8bit-plain", "--recipe clearpact-fashion-plain"),
        Row("fashion-mnist-cnn2-8bit-plain-longer", "--recipe clearpact-fashion-longer",
            init="fashion-mnist-cnn2-8bit-plain"),
        Row("fashion-mnist-cnn2-8bit-sgt", "--recipe clearpact-fashion", asked=93.7,
            init="fashion-mnist-cnn2-8bit-plain-longer"),
    ),
    "mnist-maps": _of_every_method("mnist"),
    "fashion-mnist-maps": _of_every_method("fashion-mnist"),
    "cifar10": (
        Row("cifar10-resnet20-float-plain-start", "--recipe clearpact-cifar10-float"),
        Row("cifar10-resnet20-float-plain-other", "--recipe clearpact-cifar10-float --seed 1"),
        Row(_CIFAR10, "--recipe clearpact-cifar10-float-longer", asked=91.5,
            init="cifar10-resnet20-float-plain-start", teacher="cifar10-resnet20-float-plain-other"),
        *(
            row
            for bits, before, asked in ((8, _CIFAR10, 91.72), (4, _CIFAR10, 91.0), (3, _plain(4), 90.0),
                                        (2, _plain(3), 88.0))
            for row in _of_bits(bits, before, asked)
        ),
    ),
    # The 4-bit row with its biases on their grids, from the file that was trained without them.
    "cifar10-4bit": (
        Row("cifar10-resnet20-4bit-plain", f"{_LAST_4BIT} --method plain --epochs 5 --lr 0.02",
            init="bench/checkpoints/cifar10-resnet20-4bit-sgt.pt", teacher=_FLOAT_FILE),
        *(
            Row(f"cifar10-resnet20-4bit-sgt-seed{seed}",
                f"{_LAST_4BIT} --method sgt --kl-weight 0.05 --epochs 3 --lr 0.01 --seed {seed}", asked=91.0,
                init="cifar10-resnet20-4bit-plain", teacher=_FLOAT_FILE)
            for seed in _SEEDS
        ),
    ),
    "chest-xrays": tuple(row for seed in _SEEDS for row in _of_a_chest(seed)),
    "steel": (
        Row("neu-128-resnet20-float-plain", f"{_STEEL} --bits 32 --method plain --epochs 24 --lr 0.05"),
        Row("neu-128-resnet20-8bit-sgt", f"{_STEEL} --bits 8 --method sgt --epochs 12 --lr 0.02 --kl-weight 0.05",
            asked=99.0, init="neu-128-resnet20-float-plain"),
    ),
    "caltech101": (
        Row(_CALTECH_FLOAT, f"{_CALTECH} --bits 32 --method plain --epochs 5 --lr 0.02", asked=91.0),
        *(
            Row(f"caltech101-128-efficientnet_lite0-8bit-{method}",
                f"{_CALTECH} --bits 8 --method {method} --epochs 2 --lr 0.003{weight}", asked=91.0,
                init=_CALTECH_FLOAT)
            # Two epochs: in its first smoot is sgt, for K moves from the second time that it sees an image.
            for method, weight in (("plain", ""), ("sgt", " --kl-weight 0.05"), ("smoot", " --kl-weight 0.05"))
        ),
        Row("caltech101-128-efficientnet_lite0-4bit-plain",
            f"{_CALTECH} --bits 4 --weight-quantizer lsq --method plain --epochs 3 --lr 0.01",
            init=_CALTECH_FLOAT),
    ),
    "deit": (
        Row("cifar10-deit_tiny-8bit-plain", f"{_DEIT} --method plain"),
        Row("cifar10-deit_tiny-8bit-sgt", f"{_DEIT} --method sgt --kl-weight 0.05"),
        Row("cifar10-deit_tiny-8bit-smoot", f"{_DEIT} --method smoot --kl-weight 0.05"),
    ),
}  # fmt: skip


def needed(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the row of that name and before it, in the table's order, those it starts from or learns from.

    Raises:
        OptionError: no row of that name.
    """
    by_name = {row.name: row for row in rows}
    if name not in by_name:
        raise OptionError(f"--only {name}: expected one of {', '.join(by_name)}")
    wanted, waiting = set(), [name]
    while waiting:
        row = by_name[waiting.pop()]
        wanted.add(row.name)
        waiting += [other for other in (row.init, row.teacher) if other in by_name]
    return [row for row in rows if row.name in wanted]


def train_row(row: Row, runs: Path, options: Sequence[str] = ()) -> Checkpoint:
    """Train a row to its end and return its checkpoint; one that is finished is only read.

    Args:
        row: what to train.
        runs: folder of all runs.
        options: of `python -m train`, for starting and resuming alike.
    """
    from train import checkpoint as checkpoints  # torch takes seconds to import: --help does without

    folder = runs / row.name
    path = folder / CHECKPOINT_NAME
    resumed = ["--resume", str(folder), *row.own_network()]
    train.main([*(resumed if path.exists() else row.arguments(runs)), *options])
    return checkpoints.load(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the rows and print what was asked and what was reached."""
    parser = command.parser("bench.rows", "Train the rows of a table of results, resuming each.", EXAMPLES)
    parser.add_argument("table", choices=tuple(TABLES))
    parser.add_argument("--only", metavar="ROW", help="this row, and before it those it starts from")
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument(
        "--epochs", type=int, help="of every row, for a trial; runs/ needs a folder of its own then"
    )
    parser.add_argument(
        "--precision", choices=STEP_PRECISIONS, help="of every row: float32 is faster on a CPU without bfloat16"
    )
    parser.add_argument(
        "--ship", metavar="FOLDER", help="write checkpoints, without optimizer, and their cards there"
    )
    record.add_options(parser, json_line=False)
    options = parser.parse_args(argv)
    rows = needed(TABLES[options.table], options.only) if options.only else list(TABLES[options.table])
    if options.precision:
        rows = [replace(row, options=f"{row.options} --precision {options.precision}") for row in rows]
    runs = Path(options.runs)
    shipped_files = [Path(options.ship, f"{row.name}{end}") for row in rows for end in _SHIPPED if options.ship]
    trained = [runs / row.name / CHECKPOINT_NAME for row in rows]
    record.check(options, inputs=trained, outputs=shipped_files)
    shared = ["--data-root", options.data_root, "--device", options.device]
    shared += ["--epochs", str(options.epochs)] if options.epochs is not None else []
    where = environment()
    reached = {}
    # What is only there for others to start from, with no aim of its own, is not shipped.
    steps = {name for row in rows for name in (row.init, row.teacher)}
    steps -= {row.name for row in rows if row.asked is not None}
    for row in rows:
        checkpoint = train_row(row, runs, shared)
        reached[row.name] = checkpoint
        found = {"table": options.table, **result(row, checkpoint, runs, where)}
        record.deliver(options, found)
        if options.ship and row.name not in steps:
            ship(row, checkpoint, found, Path(options.ship))
    print(f"\n{'row':32}  epochs  asked  train %   test %")
    for row in rows:
        last = reached[row.name].history[-1]
        asked = "" if row.asked is None else f"{row.asked:.1f}"
        print(f"{row.name:32}{len(reached[row.name].history):8}{asked:>7}{last['train_accuracy']:9.2f}"
              f"{last['test_accuracy']:9.2f}")  # fmt: skip
    print(describe(where))


def ship(row: Row, checkpoint: Checkpoint, found: dict[str, object], folder: Path) -> None:
    """Write a finished row's checkpoint and its card."""
    from train import checkpoint as checkpoints

    file = folder / f"{row.name}.pt"
    checkpoints.save(shipped(row, checkpoint), file)
    text = card(found, record.read(RESULTS), file.stat().st_size)
    write_atomically(file.with_suffix(".md"), text)


def shipped(row: Row, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without what only resuming needs, half of it, and without this machine's paths."""
    init, teacher = (_file(Path("runs"), name) if name else "" for name in (row.init, row.teacher))
    recipe = replace(checkpoint.recipe, init=init, teacher=teacher)
    return replace(checkpoint, optimizer={}, guidance={}, recipe=recipe)


def result(row: Row, checkpoint: Checkpoint, runs: Path, where: Mapping[str, object]) -> dict[str, object]:
    """Return what is kept of a finished row: command, recipe, accuracies, smoot's K, the file's sha256 ..."""
    data = read_bytes(runs / row.name / CHECKPOINT_NAME)
    last = checkpoint.history[-1]
    masked = {key.removeprefix(_MASKED): value for key, value in last.items() if key.startswith(_MASKED)}
    return {
        "bench": "training row",
        "row": row.name,
        "arch": checkpoint.arch["name"],
        "command": shlex.join(["python", "-m", "train", *row.arguments(Path("runs"))]),
        "asked": row.asked,
        "test_accuracy": checkpoint.test_accuracy,
        "train_accuracy": last["train_accuracy"],
        "epochs": len(checkpoint.history),
        **({"mask_percent": masked} if masked else {}),
        "seconds": sum(epoch["seconds"] for epoch in checkpoint.history),
        "recipe": asdict(shipped(row, checkpoint).recipe),
        "bits": checkpoint.quant.bits,
        "checkpoint_sha256": hashlib.sha256(data).hexdigest(),
        "environment": where,
    }


if __name__ == "__main__":
    command.run(main)
