"""A way out by ONNX: a strongly typed model with the plan's casts, for TensorRT, ONNX Runtime and what reads ONNX."""
