"""Fused ops -> calls of kernels: a file for each family of ops, registered in ``handlers``."""

from slmtvm.passes.lower_kernels.lower import KEPT, lower_kernels
from slmtvm.passes.lower_kernels.sparse import SPARSE

__all__ = ["KEPT", "SPARSE", "lower_kernels"]
