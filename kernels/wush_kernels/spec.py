"""What a kernel must know of a number format: `wush.formats` has it, and so has any object with these attributes."""

from typing import Protocol

import torch


class FormatSpec(Protocol):
    """Groups of `group_size` elements that share a scale; a value is `element * scale * global_scale`."""

    @property
    def name(self) -> str:
        """`mxfp4`, `nvfp4`, `int4` or `mxfp8`."""

    @property
    def scale_rule(self) -> str:
        """How a group's scale is found, such as `paper` or `ocp`."""

    @property
    def group_size(self) -> int:
        """Elements along the last dimension that share a scale."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """The scales' type."""

    @property
    def global_scale(self) -> float:
        """The factor shared by every group of a tensor."""


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INT4_RMS_FACTOR = 2 * 2.513930578568423 / 15  # a group's scale over its root mean square: the best clip of a Gaussian
ELEMENTS = {
    ("mxfp4", "paper"): "e2m1",
    ("mxfp4", "ocp"): "e2m1",
    ("nvfp4", "fixed"): "e2m1",
    ("nvfp4", "calibrated"): "e2m1",
    ("int4", "rms"): "int4_midpoint",
    ("int4", "midrise"): "int4_midpoint",
    ("int4", "absmax"): "int4_symmetric",
    ("mxfp8", "ocp"): "e4m3",
}


def element_of(fmt: FormatSpec) -> str:
    """The element type, as `wush_kernels.numerics.snap` spells it; raises `ValueError` for a format without kernels."""
    element = ELEMENTS.get((fmt.name, fmt.scale_rule))
    if element is None:
        known = ", ".join(f"{name}/{rule}" for name, rule in ELEMENTS)
        raise ValueError(f"{fmt.name}/{fmt.scale_rule}: no kernel knows this format; there are {known}")
    return element
