"""`textlora.transform.onnx` under its path in releases before 0.2."""

from textlora.transform.onnx import adapter_inputs, export_adapter, export_base, export_classifier

__all__ = ["adapter_inputs", "export_adapter", "export_base", "export_classifier"]
