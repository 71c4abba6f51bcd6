"""What export may be asked for, apart from what does it: commands read their options before torch is loaded."""

from runtime.errors import OptionError
from runtime.manifest import CAM_METHODS

# Engines that a graph is lowered for.
TARGETS = ("openvino", "ort", "tensorrt")
# Which rule decides where a quantized activation lets the gradient through.
GATES = ("code", "ste")
# Of the gradient's products.
SALIENCY_PRECISIONS = ("auto", "float32", "int8")
# What a file may be explained by.
EXPLANATIONS = ("gradient", *CAM_METHODS)
EXPLAIN_HELP = (
    f"maps in the file: {', '.join(EXPLANATIONS)}, comma-separated; METHOD:LAYER of another layer than the last "
    "convolution (default: gradient)"
)


def explanations(text: str, *, no_saliency: bool) -> tuple[bool, tuple[tuple[str, str], ...]]:
    """Return whether the input gradient is asked for, and the maps of layers as pairs of method and layer.

    Args:
        text: of `--explain`, such as "gradient,gradcam,layercam:stage2"; the layer "" is the last convolution.
        no_saliency: whether `--no-saliency` was given.

    Raises:
        OptionError: no such method, a layer of the gradient, one map twice, or both options.
    """
    if no_saliency and text != "gradient":
        raise OptionError(f"--no-saliency leaves out the maps that --explain {text} asks for; drop one of them")
    asked: list[tuple[str, str]] = []
    for part in map(str.strip, text.split(",")):
        method, _, layer = part.partition(":")
        if method not in EXPLANATIONS:
            raise OptionError(f"--explain {part}: expected {', '.join(EXPLANATIONS)}, of a layer layercam:LAYER")
        if layer and method == "gradient":
            raise OptionError(f"--explain {part}: the gradient is by the image and has no layer; drop :{layer}")
        if (method, layer) in asked:
            raise OptionError(f"--explain {text}: {part} twice; drop one of them")
        asked.append((method, layer))
    return ("gradient", "") in asked and not no_saliency, tuple(one for one in asked if one[0] != "gradient")
