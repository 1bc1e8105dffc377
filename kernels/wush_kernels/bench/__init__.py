"""The benchmark of the kernels, of layers and models built on them, and of the quantizer.

`python -m wush_kernels.bench` runs it. It is the one part of this package that may import `wush`.
"""
