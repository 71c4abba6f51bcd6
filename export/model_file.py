"""An ONNX file as it is on disk: read whole, with the weights that lie in files beside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.checker
from google.protobuf.message import DecodeError

from runtime.errors import FileError
from runtime.files import read_bytes


def read_model(path: Path) -> tuple[onnx.ModelProto, list[Path]]:
    """Return a model with all its weights, and the files beside it in which some of them lay.

    Raises:
        FileError: the file, or one that holds its weights, is not there, or it is no whole ONNX file.
    """
    data = read_bytes(path)
    try:
        model = onnx.load_from_string(data)
        beside = _weight_files(model, path)
        missing = [file for file in beside if not file.is_file()]
        if missing:
            raise FileError(
                f"{path}: its weights lie in {missing[0].name}, which is not beside it; put it there, or save the "
                "model as one file"
            )
        onnx.load_external_data_for_model(model, str(path.parent))
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        line = str(error).strip().split("\n")[0]
        raise FileError(f"{path}: is not a whole ONNX file ({line}); export it again") from None
    return model, beside


def _weight_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    return list(dict.fromkeys(path.parent / entry.value for entry in entries if entry.key == "location"))


def input_names(model: onnx.ModelProto) -> list[str]:
    """Return the names of a graph's inputs that are no constants."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in constants]
