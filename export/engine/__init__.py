"""TensorRT plans from ONNX files: `python -m export.engine`."""
