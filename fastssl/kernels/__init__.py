"""The kernels behind `fastssl.ops`: a folder per op with its reference, its kernels and its README.

The public functions are in `fastssl.ops`, so that none of them hides the package of the same name here.
"""
