"""Exports that several tests look at, each made once; nobody changes them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.pipeline import ExportResult, export
from runtime.onnx_bytes import without_gradient
from train.checkpoint import Checkpoint

_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(export).parameters.items()}
_made: dict[tuple[int, str], tuple[Checkpoint, ExportResult]] = {}


def exported(checkpoint: Checkpoint, **settings: Any) -> ExportResult:
    """Return the export of a checkpoint that lives as long as the tests do.

    Args:
        checkpoint: of a fixture of the session or the module.
        settings: of `export.pipeline.export`.
    """
    given = {name: value for name, value in settings.items() if value != _DEFAULTS[name]}
    key = id(checkpoint), repr(sorted(given.items()))
    if key not in _made:
        _made[key] = checkpoint, export(checkpoint, **settings)  # which stays alive: its id is not given again
    return _made[key][1]


def exported_class(checkpoint: Checkpoint, **settings: Any) -> onnx.ModelProto:
    """Return the same without its gradient."""
    return onnx.load_from_string(without_gradient(exported(checkpoint, **settings).data))


def class_only(path: Path) -> onnx.ModelProto:
    """Return the model of a file without its gradient."""
    model = onnx.load_from_string(without_gradient(path.read_bytes()))
    onnx.checker.check_model(model, full_check=True)
    return model


def pixels(checkpoint: Checkpoint, n: int) -> np.ndarray:
    """Return the first samples of a checkpoint, uint8 [n, H, W, C]."""
    return checkpoint.samples["images"][:n].permute(0, 2, 3, 1).contiguous().numpy()
