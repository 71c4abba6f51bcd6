"""The input gradient of an ONNX classifier, as part of its graph."""

from export.choices import GATES
from export.gradient.walk import OUTPUTS, append_input_gradient

__all__ = ["GATES", "OUTPUTS", "append_input_gradient"]
