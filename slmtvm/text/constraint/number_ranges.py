"""Numbers between two bounds, as a regex of how they are written."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import cache

from slmtvm.errors import ConstraintError

MOST_DIGITS = 15  # of a number's whole part: every float64 tells these apart
_LEAST_DECIMALS, _MOST_DECIMALS = 2, 9
INTEGER = r"-?(?:0|[1-9][0-9]{0,14})"
NUMBER = INTEGER + r"(?:\.[0-9]{1,9})?(?:[eE][+-]?[0-9]{1,2})?"


def integer_regex(least: Decimal | None, most: Decimal | None, said: str) -> str:
    """Whole numbers from ``least`` to ``most``, of up to 15 digits where one is None.

    Raises ConstraintError, with ``said``, where there is none.
    """
    low, high = _whole_bounds(least, most, 0, said)
    return _signed(low, high, 0)


def number_regex(
    least: Decimal | None, most: Decimal | None, strict_least: bool, strict_most: bool, said: str
) -> str:
    """Numbers from ``least`` to ``most``, without them where strict: whole ones, and with decimals.

    As many decimals as the bounds have, two to nine. Raises ConstraintError, with ``said``, where
    there is no such number.
    """
    decimals = min(max(_decimals(least), _decimals(most), _LEAST_DECIMALS), _MOST_DECIMALS)
    step = Decimal(1).scaleb(-decimals)
    # Without its bounds: the next number of so many decimals.
    if least is not None and strict_least:
        least += step
    if most is not None and strict_most:
        most -= step
    low, high = _whole_bounds(least, most, decimals, said)
    options = [_signed(low, high, decimals)]
    unit = 10**decimals
    first, last = -(-low // unit), high // unit
    if first <= last:
        options.append(_signed(first, last, 0))
    return f"(?:{'|'.join(options)})"


def _decimals(bound: Decimal | None) -> int:
    if bound is None:
        return 0
    exponent = bound.normalize().as_tuple().exponent
    assert isinstance(exponent, int)  # a bound is finite
    return max(0, -exponent)


def _whole_bounds(
    least: Decimal | None, most: Decimal | None, decimals: int, said: str
) -> tuple[int, int]:
    """Both in units of the last decimal."""
    limit = 10**MOST_DIGITS - 1
    low, high = -limit * 10**decimals, limit * 10**decimals
    if least is not None:
        low = max(low, int(least.scaleb(decimals).to_integral_value(ROUND_CEILING)))
    if most is not None:
        high = min(high, int(most.scaleb(decimals).to_integral_value(ROUND_FLOOR)))
    if low > high:
        raise ConstraintError(f"{said} allows no number of up to {MOST_DIGITS} digits")
    return low, high


def _signed(low: int, high: int, decimals: int) -> str:
    options = []
    if low < 0:
        options.append("-" + _unsigned(max(1, -high), -low, decimals))
    if high >= 0:
        options.append(_unsigned(max(0, low), high, decimals))
    return f"(?:{'|'.join(options)})"


def _unsigned(low: int, high: int, decimals: int) -> str:
    """Numbers from ``low`` to ``high``, of which the last digits are decimals."""
    options = []
    for digits in range(decimals + 1, len(str(high)) + decimals + 2):
        # Numbers of so many digits, those below one with a zero in front.
        least = 0 if digits == decimals + 1 else 10 ** (digits - 1)
        first, last = max(low, least), min(high, 10**digits - 1)
        if first <= last:
            options.append(_between(f"{first:0{digits}}", f"{last:0{digits}}", decimals))
    return f"(?:{'|'.join(options)})"


@cache
def _between(low: str, high: str, decimals: int) -> str:
    """Digits between two rows of equally many, a point before the last ``decimals``."""
    if not low:
        return ""
    point = r"\." if len(low) == decimals else ""
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return point + _digit(low[0], high[0]) + _any(rest, decimals)
    if low[0] == high[0]:
        return point + low[0] + _between(low[1:], high[1:], decimals)
    options = [low[0] + _between(low[1:], "9" * rest, decimals)]
    if int(high[0]) - int(low[0]) > 1:
        middle = _digit(str(int(low[0]) + 1), str(int(high[0]) - 1))
        options.append(middle + _any(rest, decimals))
    options.append(high[0] + _between("0" * rest, high[1:], decimals))
    return f"{point}(?:{'|'.join(options)})"


def _digit(low: str, high: str) -> str:
    return low if low == high else f"[{low}-{high}]"


def _any(count: int, decimals: int) -> str:
    if decimals == 0 or count < decimals:
        return f"[0-9]{{{count}}}" if count else ""
    whole = count - decimals
    return (f"[0-9]{{{whole}}}" if whole else "") + rf"\.[0-9]{{{decimals}}}"
