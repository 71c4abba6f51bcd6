"""Stage two: a checkpoint becomes QDQ ONNX with its input gradient, lowered for one engine."""
