"""The options of `python -m train`; torch is not needed to read or to show them."""

from __future__ import annotations

import argparse

from runtime import command
from runtime.errors import OptionError
from train.choices import (
    ARCHITECTURES,
    FILLS,
    FLOAT_BITS,
    MEMORY_BYTES,
    METHODS,
    OPTIMIZERS,
    SCHEDULES,
    STEP_PRECISIONS,
    WEIGHT_METHODS,
)
from train.data import names

EXAMPLES = """
  python -m train --data digits                                # seconds, no download
  python -m train --data mnist --arch cnn2 --bits 8 --method sgt
  python -m train --data cifar10 --arch resnet20 --bits 4 --epochs 200 --device cuda
  python -m train --recipe maleki2024-cifar10 --device cuda    # as published; see --list-recipes
  python -m train --data folder:photos --image-size 96 --flip  # photos/cat/1.jpg, photos/dog/2.png, ...
  python -m train --data cifar10 --arch my_project.nets:small_net    # your own network; say --arch again to resume
  python -m train --resume runs/mnist-cnn2-8bit-sgt            # from its last epoch
  torchrun --nproc-per-node 2 -m train --data cifar10 --arch resnet20    # two GPUs, or two processes on the CPU
  tensorboard --logdir runs                                    # curves and alphas of all runs
"""


def training_parser() -> argparse.ArgumentParser:
    """Return the parser of every option; a recipe's fields carry their own names."""
    parser = command.parser("train", "Train a quantized, saliency-guided image classifier.", EXAMPLES)
    parser.add_argument("--data", type=names.check_name, metavar="NAME", help=names.EXPECTED)
    parser.add_argument(
        "--recipe", metavar="NAME", help="a published experiment, or one of ours; other options override it"
    )
    parser.add_argument("--list-recipes", action="store_true", help="show all recipes and stop")
    parser.add_argument("--arch", metavar="NAME",
                        help=f"{', '.join(ARCHITECTURES)} or your own module:factory (default: cnn2)")  # fmt: skip
    parser.add_argument("--bits", type=_bits, help="2 to 8, or 32 for float (default: 8)")
    parser.add_argument("--bits-file", metavar="JSON", help='bits of single layers: {"conv2": 4, "fc1": 2}')
    parser.add_argument("--method", choices=METHODS, help="default: sgt")
    parser.add_argument("--weight-quantizer", choices=WEIGHT_METHODS, help="default: absmax")
    parser.add_argument("--full-range", action="store_true",
                        help="8-bit codes 0..255, not 0..127: faster on CPUs, not for TensorRT")  # fmt: skip
    parser.add_argument("--quantize-adds", action="store_true",
                        help="residual sums add codes: faster on ONNX Runtime, refused by TensorRT")  # fmt: skip
    for old, new in (("--full-grid", "full_range"), ("--addends", "quantize_adds")):  # what 0.1 called them
        parser.add_argument(old, dest=new, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--weights", dest="weight_quantizer", choices=WEIGHT_METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--bias-grid", action=argparse.BooleanOptionalAction,
                        help="biases in whole steps of their sums: exact on ONNX Runtime (default)")  # fmt: skip
    parser.add_argument("--data-root", default="data", help="folder of the data sets' files (default: data)")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="name of the run's folder (default: from data, arch, bits, method)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    parser.add_argument("--resume", metavar="FOLDER", help="continue an interrupted run; its settings are kept")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    folders = parser.add_argument_group("image folders (folder:PATH, kvasir, caltech101)")
    folders.add_argument("--image-size", type=int, metavar="PIXELS",
                         help="side they get, cropped and resized (default: 64; the named ones 224)")  # fmt: skip
    folders.add_argument("--split-seed", type=int, help="of the split 80/10/10, where there is none (default: 0)")
    folders.add_argument("--test-share", type=float, metavar="SHARE",
                         help="of such a split that tests, 0 to 0.5 (default: 0.1)")  # fmt: skip
    folders.add_argument("--strict", action="store_true", help="stop at an image that cannot be read")
    folders.add_argument("--workers", type=int, help="processes that decode (default: one a core, if worth it)")
    folders.add_argument("--memory-gib", type=float, default=MEMORY_BYTES / 2**30, metavar="GIB",
                         help="larger data sets are decoded batch by batch (default: %(default)g)")  # fmt: skip
    hyper = parser.add_argument_group("hyperparameters (defaults depend on the data set and the method)")
    hyper.add_argument("--epochs", type=int)
    hyper.add_argument("--batch-size", type=int, help="images a step")
    hyper.add_argument("--optimizer", choices=OPTIMIZERS)
    hyper.add_argument("--lr", type=float, help="(peak) learning rate")
    hyper.add_argument("--schedule", choices=SCHEDULES, help="cosine after one epoch of warm-up, or constant")
    hyper.add_argument("--momentum", type=float, help="of sgd")
    hyper.add_argument("--weight-decay", type=float, help="L2 on weights")
    hyper.add_argument("--alpha-decay", type=float, help="L2 on PACT's alpha")
    hyper.add_argument("--alpha-lr", type=float, help="learning rate of alpha, as a multiple of --lr")
    hyper.add_argument("--label-smoothing", type=float)
    hyper.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half the training images")
    hyper.add_argument("--crop-padding", type=int, help="border in pixels for random crops")
    hyper.add_argument("--rotate-degrees", type=float, help="largest random rotation")
    hyper.add_argument("--zoom", type=float, help="largest random growth or shrinkage, as a share")
    hyper.add_argument("--elastic-pixels", type=float, help="size of random elastic displacements")
    hyper.add_argument("--erase-pixels", type=int, help="side of a random grey square")
    hyper.add_argument("--color-jitter", type=float, metavar="SHARE", help="of brightness, contrast, saturation")
    hyper.add_argument("--class-weights", action=argparse.BooleanOptionalAction, help="weight rare classes more")
    hyper.add_argument("--balanced-sampling", action=argparse.BooleanOptionalAction, help="draw classes equally")
    hyper.add_argument(
        "--mask-share", type=float, help="share of the pixels that sgt masks, 0 to 1; where smoot and asg start"
    )
    hyper.add_argument("--kl-weight", type=float, help="lambda of sgt and smoot, lambda_1 of asg")
    hyper.add_argument("--fill", choices=FILLS, help="what masked pixels hold")
    hyper.add_argument("--top1-weight", type=float, help="alpha of smoot, 0 to 1")
    hyper.add_argument("--mask-speed", type=float, help="mu of smoot")
    hyper.add_argument("--saliency-weight", type=float, help="lambda_2 of asg")
    hyper.add_argument("--alpha-weight", type=float, help="eta of asg")
    hyper.add_argument("--threshold-rate", type=float, help="gamma of asg")
    hyper.add_argument("--precision", choices=STEP_PRECISIONS,
                       help="of a step's convolutions; weights stay float32")  # fmt: skip
    hyper.add_argument("--init", metavar="CKPT", help="start from its parameters: same architecture, any bits")
    hyper.add_argument("--pretrained", action="store_true", default=None,
                       help="start from the parameters that torchvision trained on ImageNet")  # fmt: skip
    hyper.add_argument("--teacher", metavar="CKPT", help="learn its probabilities too (distillation)")
    hyper.add_argument("--teacher-weight", type=float, help="share of the teacher in the loss, 0 to 1")
    hyper.add_argument("--temperature", type=float, help="of the teacher's probabilities")
    hyper.add_argument("--validation", type=int, metavar="N",
                       help="training images held out, to choose among runs (folders have their own)")  # fmt: skip
    hyper.add_argument("--seed", type=int, help="of everything random (default: 0)")
    return parser


def _bits(text: str) -> int:
    if text not in {str(b) for b in range(2, 9)} | {str(FLOAT_BITS)}:
        raise OptionError(f"--bits {text}: expected a whole number from 2 to 8, or 32 for float")
    return int(text)
