"""Setting weights to zero in patterns that kernels skip: ``slmtvm prune``."""

from slmtvm.prune.pruning import METHODS, prune
from slmtvm.prune.report import PruneReport

__all__ = ["METHODS", "PruneReport", "prune"]
