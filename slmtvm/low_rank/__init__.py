"""A KV cache of fewer features than heads have: which ones, as a calibration text asks for."""

from slmtvm.low_rank.cache import low_rank, parse_kv
from slmtvm.low_rank.report import RankReport

__all__ = ["RankReport", "low_rank", "parse_kv"]
