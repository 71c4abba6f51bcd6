"""What export may be asked for, apart from what does it: commands read their options before torch is loaded."""

# Engines that a graph is lowered for.
TARGETS = ("openvino", "ort", "tensorrt")
# Which rule decides where a quantized activation lets the gradient through.
GATES = ("code", "ste")
# Of the gradient's products.
SALIENCY_PRECISIONS = ("auto", "float32", "int8")
