"""An ONNX file to a checked Graph; nothing that it claims is believed before it is checked."""
