"""The input gradient of an ONNX classifier, as part of its graph."""

from export.gradient.walk import GATES, OUTPUTS, append_input_gradient

__all__ = ["GATES", "OUTPUTS", "append_input_gradient"]
