"""The command `clearpact`: the same mains as `python -m ...`, and no file of the current folder is run instead."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime import command
from runtime.errors import OptionError

# Name -> the module whose `main` it is, and what it does.
COMMANDS = {
    "train": ("train.__main__", "train a network into a run folder"),
    "average": ("train.average", "the mean of the weights of several runs"),
    "data": ("train.data.__main__", "write one split of a data set as an .npz file"),
    "export": ("export.onnx", "a checkpoint to a verified ONNX file"),
    "gradient": ("export.gradient.__main__", "append the input gradient to any ONNX classifier"),
    "engine": ("export.engine.__main__", "an ONNX file or checkpoint to a TensorRT plan"),
    "classify": ("runtime.classify", "classify and explain image files"),
    "latency": ("bench.latency", "how long a model takes"),
    "accuracy": ("bench.accuracy", "accuracy of a model on its engine"),
    "saliency": ("bench.saliency", "how well explanations find what a network relies on"),
    "sanity": ("bench.sanity", "do maps change when the weights become random"),
    "robustness": ("bench.robustness", "accuracy under attacks that the file itself computes"),
    "outliers": ("bench.outliers", "does a file know images that are none of its own"),
    "compare": ("bench.compare", "one checkpoint on several engines"),
    "agreement": ("bench.agreement", "two files, or a file and its checkpoint, image by image"),
    "inspect": ("bench.inspect", "what is in a file, and what an engine makes of it"),
    "sensitivity": ("bench.sensitivity", "what each layer costs at fewer bits"),
    "report": ("bench.report.__main__", "one page of figures of runs and files"),
    "edge-app": ("deploy.edge_app.__main__", "the smallest app that embeds a classifier"),
    "batch": ("deploy.batch.__main__", "classify and explain images of any number"),
    "web": ("deploy.web.__main__", "a page that runs a model in a browser"),
    "sign": ("deploy.sign", "sign model files, so that a device runs no others"),
    "ovms": ("deploy.ovms", "a model repository for OpenVINO Model Server"),
    "triton": ("deploy.triton", "a model repository for Triton"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first argument names.

    Raises:
        OptionError: there is no such command, or another program's files stand in the place of ours.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = "\n".join(f"  {name:12} {text}" for name, (_, text) in COMMANDS.items())
    examples = "  clearpact train --data mnist --arch cnn2 --bits 8\n  clearpact export runs/mnist/ckpt.pt --int8"
    parser = command.parser("runtime.console", f"Commands:\n{names}", examples)
    parser.prog = "clearpact"
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="clearpact COMMAND --help says more")
    options = parser.parse_args(arguments[:1])
    module, _ = COMMANDS[options.command]
    _check_stage(module.split(".")[0])
    try:
        status: int | None = importlib.import_module(module).main(arguments[1:])
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("train", "export", "runtime", "bench", "deploy"):
            raise
        raise OptionError(
            f"{options.command}: needs {missing}, which is not installed; install the wheel with the extra that "
            "brings it: train, export, openvino, ort, tensorrt or tools"
        ) from None
    return status


def _check_stage(stage: str) -> None:
    """Refuse to run a user's own train.py or export.py in the place of a stage."""
    spec = importlib.util.find_spec(stage)  # which runs nothing of it
    if spec is None:
        raise OptionError(f"{stage}: this installation leaves it out; install the whole wheel with its extra")
    found = Path(spec.origin or stage)
    if found.resolve() != Path(__file__).resolve().parents[1] / stage / "__init__.py":
        raise OptionError(f"{stage}: {found} stands in the place of ours; rename it, or start from another folder")


def run() -> None:
    """Start `clearpact`: without the current folder on the path."""
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != Path.cwd()]
    command.run(main)
