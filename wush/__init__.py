"""WUSH: adaptive block transforms and 4-bit quantization of language models.

A plain library over torch and transformers. It knows nothing of configs, trackers, clusters or result files.
Names are loaded on first use, so that `wush.texts` and `wush.errors` cost no torch import.
"""

import importlib
from typing import Any

_HOMES = {
    "quantize": "wush.walk",
    "QuantizationReport": "wush.reports",
    "BlockReport": "wush.reports",
    "LayerReport": "wush.reports",
    "LayerLoss": "wush.losses",
    "SavedBlocks": "wush.reports",
    "measure": "wush.measurement",
    "Measured": "wush.measurement",
    "BlockError": "wush.measurement",
    "Lost": "wush.lost",
    "evaluate": "wush.evaluation",
    "original_states": "wush.evaluation",
    "Evaluation": "wush.evaluation",
    "WindowSums": "wush.evaluation",
    "layer_loss": "wush.evaluation",
    "QuantLinear": "wush.linear",
    "use_kernels": "wush.backends",
    "join": "wush.joint",
    "Format": "wush.formats",
    "Mxfp4": "wush.formats",
    "Nvfp4": "wush.formats",
    "Int4": "wush.formats",
    "Mxfp8": "wush.formats",
    "Unquantized": "wush.formats",
    "MXFP4": "wush.formats",
    "NVFP4": "wush.formats",
    "INT4": "wush.formats",
    "MXFP8": "wush.formats",
    "Transform": "wush.transforms",
    "Identity": "wush.transforms",
    "RandomRotation": "wush.transforms",
    "Hadamard": "wush.transforms",
    "SmoothQuant": "wush.transforms",
    "Hu": "wush.transforms",
    "Wus": "wush.transforms",
    "Wush": "wush.transforms",
    "Rtn": "wush.algorithms",
    "Gptq": "wush.algorithms",
    "MrGptq": "wush.mr_gptq",
    "SecondMoment": "wush.moments",
    "Inputs": "wush.moments",
    "windows": "wush.texts",
    "METHOD_VERSION": "wush.version",
    "NumericError": "wush.errors",
    "UnsupportedModelError": "wush.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wush' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
