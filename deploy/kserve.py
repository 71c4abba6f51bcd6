"""A client of OpenVINO Model Server: pixels to class and map, with numpy and the standard library.

It speaks KServe's protocol, version 2 (https://github.com/kserve/open-inference-protocol), with its extension for
binary tensors: pixels cross the network as bytes, and maps as float32. Triton speaks it too, but its plans with an
open batch take `target` as [N, 1] (deploy/triton.py): ask it for maps with `infer`.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.errors import EngineError
from runtime.images import to_batch
from runtime.manifest import INPUT_NAME, TARGET_NAME, Manifest
from runtime.prediction import softmax

_DTYPES = {"UINT8": "<u1", "INT64": "<i8", "FP32": "<f4"}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_HEAD_LENGTH = "Inference-Header-Content-Length"


def classify(
    server: str,
    model: str,
    image: np.ndarray,
    manifest: Manifest,
    *,
    map: str | None = None,
    timeout_s: float = 10.0,
) -> tuple[str, float, np.ndarray | None]:
    """Return class, probability and map of one image from a repository of deploy.ovms.

    Args:
        server: address, such as "http://127.0.0.1:8000".
        model: its name there.
        image: uint8 [H, W] or RGB [H, W, 3]; it is resized here, since a server does not do it.
        manifest: of the model's file; deploy.ovms leaves it beside the model.
        map: name of the output to return, such as "saliency", float32 [h, w]; None asks for the class alone.
        timeout_s: for the answer.

    Raises:
        EngineError: the server does not answer, or refuses the request.
        ImageError: it is no image that the model takes.
    """
    inputs: dict[str, np.ndarray] = {INPUT_NAME: to_batch(image, manifest.input)}
    outputs = ["logits"]
    if map is not None:
        inputs[TARGET_NAME] = np.full(1, -1, np.int64)  # the predicted class
        outputs.append(map)
    found = infer(server, model, inputs, outputs, timeout_s=timeout_s)
    logits = found["logits"][0]
    best = int(logits.argmax())
    probability = float(softmax(logits / manifest.temperature)[best])
    return manifest.classes[best], probability, None if map is None else found[map][0]


def infer(
    server: str, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *, timeout_s: float = 10.0
) -> dict[str, np.ndarray]:
    """Run a model on a server.

    Args:
        server: address, such as "http://127.0.0.1:8000".
        model: its name there.
        inputs: uint8, int64 or float32 arrays by name.
        outputs: names of what is wanted.
        timeout_s: for the answer.

    Returns:
        The outputs by name.

    Raises:
        EngineError: the server does not answer, refuses the request, or answers in another protocol.
    """
    parts = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    head = json.dumps(
        {
            "inputs": [
                {"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype],
                 "parameters": {"binary_data_size": array.nbytes}}
                for name, array in parts.items()
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
        }
    ).encode()  # fmt: skip
    body = head + b"".join(array.tobytes() for array in parts.values())
    request = urllib.request.Request(
        f"{server.rstrip('/')}/v2/models/{model}/infer",
        data=body,
        headers={_HEAD_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            length, content = answer.headers.get(_HEAD_LENGTH), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            raise EngineError(f"{server}: refuses the request for {model} ({_reason(error)})") from None
    except (OSError, ValueError) as error:
        said = getattr(error, "reason", error)
        raise EngineError(f"{server}: does not answer ({said}); check the address and the server") from None
    try:
        return _tensors(content, len(content) if length is None else int(length))
    except (ValueError, KeyError, TypeError):
        raise EngineError(
            f"{server}: the answer is not KServe's protocol 2; check that the port is the one for REST"
        ) from None


def _tensors(content: bytes, head_bytes: int) -> dict[str, np.ndarray]:
    """Return the tensors of an answer, binary or, from a server without the extension, as numbers in its JSON."""
    at, found = head_bytes, {}
    for output in json.loads(content[:head_bytes])["outputs"]:
        dtype, shape = np.dtype(_DTYPES[output["datatype"]]), tuple(output["shape"])
        if "data" in output:
            found[output["name"]] = np.asarray(output["data"], dtype).reshape(shape)
            continue
        size = int(output["parameters"]["binary_data_size"])
        array = np.frombuffer(content, dtype, math.prod(shape), at)
        if array.nbytes != size:
            raise ValueError("sizes that differ")
        found[output["name"]] = array.reshape(shape)
        at += size
    return found


def _reason(error: urllib.error.HTTPError) -> str:
    said = error.read(1000)
    try:
        reason: Any = json.loads(said)["error"]
    except (ValueError, KeyError, TypeError):
        reason = error.reason
    return f"{error.code}: {' '.join(str(reason).split())}"
