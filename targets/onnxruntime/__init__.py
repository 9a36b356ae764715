"""Training steps as ordinary ONNX models."""
