"""Fused ops -> calls of kernels: a file for each family of ops, registered in ``handlers``."""

from slmtvm.passes.lower_kernels.lower import lower_kernels

__all__ = ["lower_kernels"]
