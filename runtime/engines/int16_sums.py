"""Processors without VNNI: which layers they would add up wrongly in INT8, and how these stay exact.

Without VNNI (x86 processors up to about 2019, AMD's up to 2022) two products u8 x s8 are added in 16 bits. They
hold 2 x 127 x 127, so codes 0..127 are safe. Signed codes are not: oneDNN moves them to 0..255 and halves the
weights to make room, and their last bit is lost: 500 images gave ResNet-20 89.6 % instead of 92.4 %. On such a
processor these layers are computed in float32 on the same codes: slower, and exact.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.engines.compiled_cache import processor_features

_LAYERS = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"}
_ISA_WITHOUT_VNNI = {"SSE41", "AVX", "AVX2", "AVX512_CORE"}  # values of oneDNN's own variable


def adds_in_int16() -> bool:
    """Return whether this processor adds products of codes in 16 bits, or may do so where that is not known."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return "vnni" not in processor_features() or os.environ.get("ONEDNN_MAX_CPU_ISA", "") in _ISA_WITHOUT_VNNI


def keep_sums_exact(model: Any, constant: Callable[[np.ndarray], Any], *, largest_code: int) -> int:
    """Let, in place, the layers whose sums 16 bits do not hold be computed in float32; return how many.

    Args:
        model: an openvino.Model as it is read.
        constant: makes one of its constants, openvino.op.Constant.
        largest_code: of unsigned activations in this file, 127 or 255.
    """
    held = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() not in _LAYERS:
            continue
        kinds = [_codes_of(node.input_value(i)) for i in (0, 1)]
        if kinds[0] is None or kinds[1] is None or (kinds[0] == "u8" and largest_code <= 127):
            continue
        weight = _folded(node.input_value(1))
        if weight is not None:  # a float weight is what keeps the plugin from int8
            node.input(1).replace_source_output(constant(weight.astype(np.float32)).output(0))
            held += 1
    return held


def _codes_of(value: Any) -> str | None:
    """Return the type of the codes that a value is made of, "i8" or "u8"; None of floats."""
    for _ in range(8):
        node = value.get_node()
        kind = value.get_element_type().get_type_name()
        if kind in ("i8", "u8"):
            return str(kind)
        if not node.get_input_size() or node.get_type_name() == "FakeQuantize":
            return None
        value = node.input_value(0)
    return None


def _folded(value: Any) -> np.ndarray | None:
    """Return what a dequantized constant holds, float32; None of what is not one."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data)
    inputs = [_folded(node.input_value(i)) for i in range(node.get_input_size())]
    if any(found is None for found in inputs):
        return None
    first, *others = (found for found in inputs if found is not None)
    match kind:
        case "Convert":
            return first.astype(np.float32)
        case "Subtract":
            return first - others[0]
        case "Multiply":
            return first * others[0]
        case "Reshape":
            return first.reshape(node.get_output_shape(0))
        case "Transpose":
            return first.transpose(others[0])
    return None
