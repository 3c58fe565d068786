"""Numbers as text: few digits, standard errors to the digits they have, and curves whose values fit no float."""

from __future__ import annotations

import math

from fathometer.results import Profile

MISSING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits.

    >>> number(0.0123456), number(31000000.0), number(float("nan"))
    ('0.0123', '3.1e7', '–')
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    if 0 <= int(exponent) < 5:
        return f"{value:.0f}"
    return f"{mantissa}e{int(exponent)}"


def with_error(value: float, error: float | None, sign: str = "±") -> str:
    """Return ``value ± error``, both to two digits of the error and at most five in all.

    >>> with_error(9.7965, 0.494), with_error(8.73e-7, 2.1e-8), with_error(1.0, None)
    ('9.80 ± 0.49', '(8.73 ± 0.21)e-7', '1')
    """
    if error is None or not math.isfinite(value) or not math.isfinite(error) or error <= 1e-5 * abs(value):
        return number(value)
    largest = math.floor(math.log10(max(abs(value), error)))
    shift = 0 if -4 < largest < 5 else largest
    scaled, spread = value / 10.0**shift, error / 10.0**shift
    most = 4 - math.floor(math.log10(max(abs(scaled), spread)))  # no more than five digits in all
    decimals = max(min(1 - math.floor(math.log10(spread)), most), 0)
    text = f"{scaled:.{decimals}f} {sign} {spread:.{decimals}f}"
    return f"({text})e{shift}" if shift else text


def curve_value(profile: Profile | None, name: str, layer: int, *, sign: str = "±") -> str:
    """Return a curve at a layer as text, with its standard error where there is one.

    A ``_log`` curve is shown as the number it is the logarithm of, also beyond the range of a float.
    """
    if profile is None or name not in profile.curves or layer >= len(profile.curves[name]):
        return MISSING
    value = float(profile.curves[name][layer])
    error = float(profile.errors[name][layer]) if name in profile.errors else None
    if not name.endswith("_log"):
        return with_error(value, error, sign)
    if not abs(value) < 690:
        return f"1e{value / math.log(10):.1f}" if math.isfinite(value) else number(value)
    plain = math.exp(value)
    return with_error(plain, None if error is None else plain * error, sign)
