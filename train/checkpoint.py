"""The checkpoint: one file of tensors and plain values that holds all that a run knows.

It is a dictionary written with torch.save and read with weights_only=True, so reading one never runs code:

    format        "clearpact.checkpoint"
    version       1
    arch          name and arguments of the architecture (train.models.build)
    quant         the QuantSpec
    input         the InputSpec
    classes       class names
    recipe        the Recipe
    state_dict    parameters and buffers of the (quantized) network
    optimizer     state of the optimizer, for resuming
    guidance      what the method has learned beside the network: SMOOT's mask share of every training image
    history       one dictionary of numbers per epoch; its length is the epoch reached
    samples       real test images uint8 [n, C, H, W] and labels, on which export verifies itself
    calibration_images  training images uint8 [n, C, H, W], on which export finds the grids of INT8 gradients
    versions      of torch and of this project

Random numbers need no state: every epoch draws from generators seeded by (seed, epoch).
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import FileError
from runtime.files import read_bytes, write_atomically
from train.data.names import is_folder
from train.input_spec import InputSpec
from train.model import Facts, QuantizedModel
from train.models.build import build
from train.quantization.quantize import quantize
from train.quantization.spec import QuantSpec
from train.recipe import Recipe
from train.state import load_state, without_wrappers

FORMAT = "clearpact.checkpoint"
VERSION = 1
_LEARNED_SCALE = ".0.learned_scale"
# What every checkpoint has; `guidance` came later.
_FIELDS = ("arch", "quant", "input", "classes", "recipe", "state_dict", "samples", "optimizer", "history")


@dataclass
class Checkpoint:
    """The contents of a checkpoint file; see the module's text for the fields."""

    arch: dict[str, Any]
    quant: QuantSpec
    input: InputSpec
    classes: tuple[str, ...]
    recipe: Recipe
    state_dict: dict[str, Tensor]
    samples: dict[str, Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    calibration_images: Tensor | None = None

    def model(self) -> QuantizedModel:
        """Return what is exported: the network with its samples, and of the training what a manifest tells.

        Raises:
            OptionError: as `network`.
        """
        return QuantizedModel(
            self.training_network(), self.input, self.classes, self.samples["images"], self.samples["labels"],
            self.calibration_images,
            Facts(
                arch=self.arch["name"],
                data=self.recipe.data_name,
                metrics={k: v for epoch in self.history[-1:] for k, v in epoch.items() if k == "test_accuracy"},
                resize="crop" if is_folder(self.recipe.data) else "bilinear",
            ),
        )  # fmt: skip

    def network(self) -> nn.Module:
        """Return the network in evaluation mode, quantized as trained, holding the saved parameters.

        Its biases are on their accumulators' grids, if the quantization says so.

        Raises:
            OptionError: a factory made it, which runs for those alone who name it (train/models/factory.py).
        """
        return self.model().evaluated()

    def training_network(self) -> nn.Module:
        """Return the network with the saved parameters as they are, which training goes on from."""
        model = new_network(self.arch, self.quant, self.input)
        load_state(model, self.state_dict, f"checkpoint of {self.arch['name']}")
        return model

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.input.channels, *self.input.size)

    def float_state(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the network before quantization, as the architecture names them."""
        renamed = {
            k.replace(".parametrizations.weight.original", ".weight"): v for k, v in self.state_dict.items()
        }
        return {k: v for k, v in renamed.items() if not (k.startswith("quantizers.") or ".parametrizations." in k)}

    @property
    def test_accuracy(self) -> float:
        """Accuracy on the test split after the last epoch, in percent."""
        return self.history[-1]["test_accuracy"]


def new_network(
    arch: dict[str, Any],
    quant: QuantSpec,
    input_spec: InputSpec,
    parameters: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Return a freshly initialized network, quantized by `quant`.

    Args:
        arch: {"name": one of train.models.build.ARCHITECTURES, or a factory, **its arguments}.
        quant: bits and quantizers.
        input_spec: sets the grid of the input image.
        parameters: of the network before quantization, all (`Checkpoint.float_state`) or all but its last layer's
            (`train.models.pretrained`), instead of random numbers.
    """
    arguments = {key: value for key, value in arch.items() if key != "name"}
    model = build(arch["name"], **arguments)
    if parameters is not None:
        load_state(model, {**model.state_dict(), **without_wrappers(parameters)}, f"parameters of {arch['name']}")
    shape = (input_spec.channels, *input_spec.size)
    return quantize(model, quant, input_scale=input_spec.grid_scale, image_shape=shape)


def save(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint atomically.

    Raises:
        FileError: `path` cannot be written.
    """
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "arch": checkpoint.arch,
        "quant": asdict(checkpoint.quant),
        "input": asdict(checkpoint.input),
        "classes": list(checkpoint.classes),
        "recipe": asdict(checkpoint.recipe),
        "state_dict": checkpoint.state_dict,
        "optimizer": checkpoint.optimizer,
        "guidance": checkpoint.guidance,
        "history": checkpoint.history,
        "samples": checkpoint.samples,
        "calibration_images": checkpoint.calibration_images,
        "versions": {"torch": str(torch.__version__)},
    }
    buffer = io.BytesIO()
    torch.save(_without_bases(contents), buffer)
    write_atomically(path, buffer.getvalue())


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Raises:
        FileError: missing, truncated, not a checkpoint of this project, or holding pickled code.
    """
    data = read_bytes(path)
    path = Path(path)
    expected = "expected a checkpoint written by `python -m train`"
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise FileError(f"{path}: {len(data)} bytes that are no complete torch file, {expected}; copy it again")
    try:
        contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FileError(
            f"{path}: holds pickled code, which is never executed, {expected}; train it here"
        ) from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError):
        raise FileError(f"{path}: damaged or not a torch file, {expected}; copy it again") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise FileError(f"{path}: a torch file of another program, {expected}")
    if contents.get("version") != VERSION:
        version = contents.get("version")
        raise FileError(f"{path}: checkpoint version {version}, expected {VERSION}; use the release that wrote it")
    missing = [key for key in _FIELDS if key not in contents]
    if missing:
        raise FileError(f"{path}: a checkpoint without {missing[0]!r}, {expected}; train it anew or copy it again")
    image = contents["input"]
    return Checkpoint(
        arch=contents["arch"],
        quant=QuantSpec.from_dict(contents["quant"]),
        input=InputSpec(tuple(image["size"]), image["channels"], tuple(image["mean"]), tuple(image["std"])),
        classes=tuple(contents["classes"]),
        recipe=Recipe.from_dict(contents["recipe"]),
        state_dict=_as_computed(contents["state_dict"], contents["quant"]),
        samples=contents["samples"],
        optimizer=contents["optimizer"],
        guidance=contents.get("guidance", {}),
        history=contents["history"],
        calibration_images=contents.get("calibration_images"),
    )


def _as_computed(state_dict: dict[str, Tensor], quant: dict[str, Any]) -> dict[str, Tensor]:
    """Return parameters that compute now what they computed when they were saved.

    Version 0.1 took the smallest float for a learned scale that had fallen to 0 or below, so that its channel gave
    0, and BatchNorm had learned that. Since then such a scale has a floor, and the channel would come alive: its
    weights become 0 here.
    """
    if "weight_quantizer" in quant:  # the field's name since then
        return state_dict
    found = dict(state_dict)
    for name, scale in state_dict.items():
        dead = scale <= 0 if name.endswith(_LEARNED_SCALE) else None
        if dead is not None and dead.any():
            weight = name.removesuffix(_LEARNED_SCALE) + ".original"
            found[weight] = torch.where(dead.reshape(-1, *[1] * (found[weight].ndim - 1)), 0.0, found[weight])
    return found


def _without_bases(value: Any) -> Any:
    """Return a value whose tensors hold their own numbers; torch writes all the memory that a view lies in."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {key: _without_bases(item) for key, item in value.items()}
    return [_without_bases(item) for item in value] if isinstance(value, list) else value
