"""The manifest: what a model file says about itself, as JSON inside the ONNX file (`metadata_props["clearpact"]`).

    version      1
    arch         name of the architecture
    precision    "int8" or "fp32"
    target       engine the graph was lowered for: "openvino", "ort" or "tensorrt"
    input        {"size": [H, W], "channels": 1 or 3, "mean": [...], "std": [...], "resize": "bilinear", "crop" or
                 "none"}; the graph's input `image` is uint8 [N, H, W, C] and normalizes itself:
                 (p / 255 - mean) / std
    classes      class names, in the order of the logits
    layers       one entry per layer: {"name", "kind", "bits" (null: float), "input": grid of its input, as text}
    metrics      numbers measured before export, such as {"test_accuracy": percent}
    data         name of the data set it was trained on
    checkpoint   sha256 of the checkpoint file, hexadecimal
    versions     of the programs that wrote it
    cams         class activation maps among the outputs: {"output", "method", "layer", "size": [h, w]};
                 absent in older files, as is all that follows
    logit_step   the most by which one code before the last layer moves the difference of two logits; null in float
    temperature  what logits are divided by before probabilities are computed of them, fitted after quantization
    float_layout ""; or "NCHW" or "NHWC": the graph's input `image` is float32 of that layout, normalized already
    reference    what the model did on validation images, see reference.py; null where it was exported without

The graph's output is `logits` float32 [N, K]. Where it explains itself it also takes `target` int64 [N] (-1: the
predicted class) and gives `gradient`, d logit_target / d normalized image, float32 [N, C, H, W], and `saliency`
float32 [N, H, W], the largest magnitude over channels; or the class activation maps, float32 [N, h, w], that
`cams` lists, or both.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from runtime.errors import ModelError
from runtime.onnx_bytes import metadata
from runtime.reference import Reference

METADATA_KEY = "clearpact"
VERSION = 1
INPUT_NAME, TARGET_NAME = "image", "target"
LAYOUTS = ("", "NCHW", "NHWC")
RESIZES = ("bilinear", "crop", "none")
# Class activation maps that a graph may compute; export/gradient/cam.py has their formulas.
CAM_METHODS = ("gradcam", "hirescam", "layercam")

_REMEDY = "export it with `python -m export.onnx`"
_KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class ImageInput:
    """The image a model takes.

    Args:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: per channel, on the scale where 255 is 1; applied inside the graph.
        std: per channel, likewise.
        resize: what happens to images of another size: "bilinear" (antialiased, the aspect ratio is not kept),
            "crop" (the same with the largest middle part that has the model's aspect ratio) or "none" (they are
            refused).
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "bilinear"


@dataclass(frozen=True)
class CamOutput:
    """A class activation map that the graph computes.

    Args:
        output: name of the graph's output, float32 [N, h, w], >= 0.
        method: one of CAM_METHODS.
        layer: name of the layer whose activations it weighs.
        size: h and w.
    """

    output: str
    method: str
    layer: str
    size: tuple[int, int]


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
    cams: tuple[CamOutput, ...] = ()
    logit_step: float | None = None
    temperature: float = 1.0
    float_layout: str = ""
    reference: Reference | None = None

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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{source}: its manifest is not readable JSON; {_REMEDY}") from None
        if version != VERSION:
            raise ModelError(f"{source}: manifest version {version}, expected {VERSION}; {_REMEDY}")
        try:
            return _from_values(values)
        except (ValueError, OverflowError) as error:
            raise ModelError(f"{source}: manifest {error}; {_REMEDY}") from None


def read_manifest(model: bytes, source: str) -> Manifest:
    """Return the manifest inside an ONNX file, without any ONNX library.

    Args:
        model: contents of the file.
        source: its name, for messages.

    Raises:
        ModelError: not an ONNX file, a truncated one, or one without manifest.
    """
    if not model:
        raise ModelError(f"{source}: an empty file, expected an ONNX file; copy or export it again")
    try:
        entries = metadata(model)
    except ValueError as error:
        raise ModelError(f"{source}: {error}, expected an ONNX file; copy or export it again") from None
    if METADATA_KEY not in entries:
        raise ModelError(f"{source}: an ONNX file without a clearpact manifest; {_REMEDY}")
    return Manifest.from_json(entries[METADATA_KEY], source)


def _from_values(values: dict[str, Any]) -> Manifest:
    """Return the manifest in a JSON object; raises ValueError with the field, its value and what it must be."""
    unknown = values.keys() - {f.name for f in fields(Manifest)}
    if unknown:
        raise ValueError(f"field {min(unknown)}: not known to this release")
    image = _typed(values, "input", dict)
    size = tuple(_items(image, "size", int))
    channels = _typed(image, "channels", int)
    mean, std = (tuple(map(float, _items(image, name, int, float))) for name in ("mean", "std"))
    classes = tuple(_items(values, "classes", str))
    for field_name, ok, expected in (
        ("size", len(size) == 2 and min(size) >= 1, "two whole numbers from 1"),
        ("channels", channels in (1, 3), "1 or 3"),
        ("resize", image.get("resize") in RESIZES, f"one of {', '.join(RESIZES)}"),
        ("mean", len(mean) == channels and all(map(math.isfinite, mean)), f"{channels} numbers"),
        (
            "std",
            len(std) == channels and all(math.isfinite(s) and s > 0 for s in std),
            f"{channels} numbers above 0",
        ),
    ):
        if not ok:
            raise ValueError(f"field {field_name} {image.get(field_name)!r}: expected {expected}")
    if not classes:
        raise ValueError("field classes []: expected at least one name")
    metrics = _typed(values, "metrics", dict)
    return Manifest(
        **{name: _typed(values, name, str) for name in ("arch", "precision", "target", "data", "checkpoint")},
        input=ImageInput((size[0], size[1]), channels, mean, std, image["resize"]),
        classes=classes,
        layers=tuple(_items(values, "layers", dict)),
        metrics={name: _typed(metrics, name, int, float) for name in metrics},
        versions=_typed(values, "versions", dict),
        **_measured(values, len(classes)),
        cams=tuple(map(_cam, _items(values, "cams", dict))) if "cams" in values else (),
    )


def _measured(values: dict[str, Any], classes: int) -> dict[str, Any]:
    """Return the fields that older files do not have."""
    found: dict[str, Any] = {}
    for name in ("logit_step", "temperature"):
        if name in values and (name, values[name]) != ("logit_step", None):
            found[name] = float(_typed(values, name, int, float))
            if not 0 < found[name] < math.inf:
                raise ValueError(f"field {name} {values[name]!r}: expected a number above 0")
    if "float_layout" in values:
        found["float_layout"] = _typed(values, "float_layout", str)
        if found["float_layout"] not in LAYOUTS:
            raise ValueError(
                f"field float_layout {values['float_layout']!r}: expected one of {', '.join(LAYOUTS)}"
            )
    if values.get("reference") is not None:
        found["reference"] = Reference.from_values(values["reference"], classes)
    return found


def _cam(values: dict[str, Any]) -> CamOutput:
    output, method, layer = (_typed(values, name, str) for name in ("output", "method", "layer"))
    if method not in CAM_METHODS:
        raise ValueError(f"field method {method!r}: expected one of {', '.join(CAM_METHODS)}")
    size = _items(values, "size", int)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"field size {size}: expected two whole numbers from 1")
    return CamOutput(output, method, layer, (size[0], size[1]))


def _typed(values: dict[str, Any], name: str, *kinds: type) -> Any:
    if name not in values:
        raise ValueError(f"field {name}: missing")
    value = values[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"field {name} {value!r}: expected {_KINDS[kinds[-1]]}")
    return value


def _items(values: dict[str, Any], name: str, *kinds: type) -> list[Any]:
    items: list[Any] = _typed(values, name, list)
    for index, item in enumerate(items):
        _typed({f"{name}[{index}]": item}, f"{name}[{index}]", *kinds)
    return items
