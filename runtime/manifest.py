"""The manifest: what a model file says about itself, as JSON inside the ONNX file (`metadata_props["clearpact"]`).

    version      1
    arch         name of the architecture
    precision    "int8" or "fp32"
    target       engine the graph was lowered for: "openvino", "ort" or "tensorrt"
    input        {"size": [H, W], "channels": 1 or 3, "mean": [...], "std": [...], "resize": "bilinear" or "none"};
                 the graph's input `image` is uint8 [N, H, W, C] and normalizes itself: (p / 255 - mean) / std
    classes      class names, in the order of the logits
    layers       one entry per layer: {"name", "kind", "bits" (null: float), "codes" and "scale" of its input}
    metrics      numbers measured before export, such as {"test_accuracy": percent}
    data         name of the data set it was trained on
    checkpoint   sha256 of the checkpoint file, hexadecimal
    versions     of the programs that wrote it

The outputs are `logits` float32 [N, K], and `saliency` float32 [N, H, W] where the graph explains itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.errors import ModelError

METADATA_KEY = "clearpact"
VERSION = 1
INPUT_NAME = "image"
RESIZES = ("bilinear", "none")

_REMEDY = "export it with `python -m export.onnx`"
# Field numbers of ModelProto and StringStringEntryProto in onnx.proto, and protobuf's wire types.
_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class ImageInput:
    """The image a model takes.

    Args:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: per channel, on the scale where 255 is 1; applied inside the graph.
        std: per channel, likewise.
        resize: what happens to images of another size: "bilinear" (antialiased, the aspect ratio is not kept)
            or "none" (they are refused).
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "bilinear"


@dataclass(frozen=True)
class Manifest:
    """What a model file says about itself; see the module's text for the fields."""

    arch: str
    precision: str
    target: str
    input: ImageInput
    classes: tuple[str, ...]
    layers: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    data: str = ""
    checkpoint: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the JSON text that `from_json` reads."""
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read a manifest.

        Args:
            text: JSON.
            source: name of the file it came from, for messages.

        Raises:
            ModelError: not JSON, another version, or a field is missing or of the wrong kind.
        """
        try:
            values = json.loads(text)
            version = values.pop("version")
        except (ValueError, KeyError, AttributeError):
            raise ModelError(f"{source}: its manifest is not readable JSON; {_REMEDY}") from None
        if version != VERSION:
            raise ModelError(f"{source}: manifest version {version}, expected {VERSION}; {_REMEDY}")
        try:
            image = values.pop("input")
            return cls(
                input=ImageInput(
                    size=_pair(image["size"]),
                    channels=_one_of(image["channels"], (1, 3)),
                    mean=tuple(image["mean"]),
                    std=tuple(image["std"]),
                    resize=_one_of(image["resize"], RESIZES),
                ),
                classes=tuple(str(name) for name in values.pop("classes")),
                layers=tuple(values.pop("layers")),
                **values,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{source}: manifest field {error}; {_REMEDY}") from None


def read_manifest(model: bytes, source: str) -> Manifest:
    """Return the manifest inside an ONNX file, without any ONNX library.

    Args:
        model: contents of the file.
        source: its name, for messages.

    Raises:
        ModelError: not an ONNX file, a truncated one, or one without manifest.
    """
    try:
        entries = [dict(_fields(value)) for number, value in _fields(model) if number == _METADATA_PROPS]
    except ValueError as error:
        raise ModelError(f"{source}: {error}, expected an ONNX file; copy or export it again") from None
    for entry in entries:
        if entry.get(_KEY) == METADATA_KEY.encode():
            return Manifest.from_json(entry.get(_VALUE, b"").decode("utf-8", "replace"), source)
    raise ModelError(f"{source}: an ONNX file without a clearpact manifest; {_REMEDY}")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and contents of every length-delimited field of a protobuf message, skipping the others."""
    at = 0
    if not message:
        raise ValueError("an empty file")
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, at = _varint(message, at)
            continue
        if wire not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"no protobuf message (byte {at})")
        length, at = _varint(message, at) if wire == _BYTES else (8 if wire == _FIXED64 else 4, at)
        if at + length > len(message):
            raise ValueError(f"truncated at {len(message)} bytes")
        if wire == _BYTES:
            yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError(f"truncated at {len(message)} bytes")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"no protobuf message (byte {at})")


def _pair(value: Any) -> tuple[int, int]:
    height, width = (int(side) for side in value)
    if min(height, width) < 1:
        raise ValueError(f"size {value}, expected two positive numbers")
    return height, width


def _one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r}, expected one of {', '.join(map(str, choices))}")
    return value
