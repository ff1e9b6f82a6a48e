"""Implementation of `fastssl.ops`: one folder per op with its reference, its kernels and its README.

Import the public functions from `fastssl.ops`. Here they would hide the packages of the same names.
"""
