"""What to do about an operator that has no gradient rule."""

from __future__ import annotations

import onnx

_UNROLLED = "export it unrolled over its steps, as MatMul, Sigmoid and Tanh"
_CHOICE = "its result is a choice or a count; name a tensor before it as --logits"
_FIXED = "the places that it reads change with the image; export the network without it"
_COMPLEX = "its numbers are complex; compute it before the image, or by MatMul with constant sines and cosines"
_REMEDIES = {
    "LSTM": _UNROLLED, "GRU": _UNROLLED, "RNN": _UNROLLED, "Hardmax": _CHOICE, "OneHot": _CHOICE,
    "NonMaxSuppression": _CHOICE, "Unique": _CHOICE, "Compress": _CHOICE, "GridSample": _FIXED,
    "DeformConv": _FIXED, "RoiAlign": _FIXED, "MaxRoiPool": _FIXED, "DFT": _COMPLEX, "STFT": _COMPLEX,
    "Attention": "export it without past keys and lengths, or at opset 22, where it is MatMul and Softmax",
}  # fmt: skip
_DEFAULT = "write it with operators that have one (export/gradient/README.md)"


def remedy_of(node: onnx.NodeProto) -> str:
    """Return what to do about a node without a rule, as the end of a message."""
    if node.domain:
        known = "export the file before an engine optimizes it, or write the node with operators of ONNX"
        return f"it is an operator of {node.domain!r}, not of ONNX; {known}"
    return f"{_REMEDIES.get(node.op_type, _DEFAULT)}; the class alone: export.onnx --no-saliency"
