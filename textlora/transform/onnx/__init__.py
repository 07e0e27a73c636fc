"""A classifier as ONNX, a base as ONNX that takes adapters as inputs, and an adapter as ONNX Runtime's
`.onnx_adapter` (docs/onnx.md).

Whatever is written is opened in ONNX Runtime and must answer as the packed model does before it gets its
name.
"""

from textlora.transform.onnx.adapters import adapter_inputs, export_adapter, export_base
from textlora.transform.onnx.merged import export_classifier, merged_weights

__all__ = ["adapter_inputs", "export_adapter", "export_base", "export_classifier", "merged_weights"]
