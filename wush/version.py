"""The version of the method: raised with every change that gives other numbers for the same config."""

# 1: signs of eigenvectors as the machine's LAPACK gave them; texts cut from the running Python's own documentation.
# 2: canonical signs and order; packaged texts; HU acts on y = L^T x (equation 15); NVFP4 inputs
#    have a calibrated scale, too, with scale_rule=calibrated.
METHOD_VERSION = 2
