"""What can go wrong that a caller may want to tell apart. Everything else is a plain `ValueError`."""


class NumericError(ArithmeticError):
    """A value or a factorization left the numbers: NaN, infinity, or a matrix that is not positive definite."""


class UnsupportedModelError(ValueError):
    """A model that is no plain one in memory, has no row of decoder blocks, or no linear to quantize."""
