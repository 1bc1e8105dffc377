"""What can go wrong that a caller may want to tell apart. Everything else is a plain `ValueError`."""


class NumericError(ArithmeticError):
    """A value or a factorization left the numbers: NaN, infinity, or a matrix that is not positive definite."""


class UnsupportedModelError(ValueError):
    """The model has no decoder blocks, or linears that this library can quantize."""
