"""Triton and CUDA kernels of 4-bit quantization. One kernel a file, each beside its reference in plain PyTorch.

They take tensors and plain numbers and know nothing of models, transforms' meaning or algorithms. Importing this
package imports neither torch nor Triton.
"""
