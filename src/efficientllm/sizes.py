"""Sizes as people write them: counts (469M, 512Ki, 8.1B), fractions (15%, 0.02), places in a run (either) and sizes
to reach (either, 0.5x, 12ms).

Every parser raises ValueError with one sentence that shows what was read and what would be right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_DECIMAL = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
_BINARY = {"Gi": 2**30, "Mi": 2**20, "Ki": 2**10}
_UNITS = {name.lower(): unit for name, unit in (_DECIMAL | _BINARY | {"": 1}).items()}
# Exponents as far as floats have them: a whole number of 1e999999999 would fill the memory.
# Commas only between groups of three: "1,5M" must not read as 15M.
_NUMBER = re.compile(r"((\d{1,3}(,\d{3})+|\d+(_\d+)*)(\.\d*)?|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE | re.ASCII)
# Below this, digits read better than a suffix (2048, not 2Ki).
_PLAIN_BELOW = 10_000


def _decimal(text: str) -> Decimal | None:
    """The non-negative number in `text`, exactly; None if it is none."""
    return Decimal(re.sub("[_,]", "", text)) if _NUMBER.fullmatch(text) else None


def parse_count(value: object) -> int:
    """A whole number >= 0 from 469000000, 4.69e8, "469M", "469_000_000" or "512Ki".

    K, M, B, T are powers of 1000 and Ki, Mi, Gi powers of 1024, in either case. Raises ValueError.
    """
    text = "" if isinstance(value, bool) else str(value).strip()
    match = re.fullmatch(r"(.*?)\s*(|[KMBT]|[KMG]i)", text, re.IGNORECASE)
    number = _decimal(match[1]) if match else None
    if match is None or number is None:
        raise ValueError(
            f"{value!r} is not a count: write a whole number that is not negative, such as 1500000, 469M, 1.1B "
            "or 512Ki (K, M, B, T count by 1000; Ki, Mi, Gi by 1024)"
        )
    count = number * _UNITS[match[2].lower()]
    if count != int(count) or count >= 2**63:
        raise ValueError(f"{value!r} is not a whole number below 2^63: write a count such as 1500000 or 469M")
    return int(count)


def format_count(count: int) -> str:
    """Four significant digits for people's eyes: 469123456 -> "469.1M", 1711376384 -> "1.711B", 512 -> "512"."""
    if count < 1000:
        return str(count)
    rounded = int(Decimal(f"{count:.3e}"))  # before the unit is chosen, so that 999999 reads 1M and not 1000K
    name, unit = next((n, u) for n, u in _DECIMAL.items() if rounded >= u)
    return f"{_plain(Decimal(rounded) / unit)}{name}"


def format_bytes(count: float) -> str:
    """Three significant digits in units of 1000, whole gigabytes from 100 on: 1234567 -> "1.23 MB"."""
    for unit in ("B", "KB", "MB"):
        if count < 999.5:  # what rounds to 1000 belongs to the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB" if count < 100 else f"{count:,.0f} GB"


def exact_count(count: int) -> int | str:
    """A readable spelling that parse_count reads back to exactly `count`: 469000000 -> "469M", 65536 -> "64Ki"."""
    if count >= _PLAIN_BELOW:
        for name, unit in _DECIMAL.items():
            if count >= unit and count % (unit // 100) == 0:  # at most two decimals
                return f"{_plain(Decimal(count) / unit)}{name}"
        for name, unit in _BINARY.items():
            if unit <= count < unit * 1024 and count % unit == 0:
                return f"{count // unit}{name}"
    return count


def parse_fraction(value: object) -> float:
    """A fraction between 0 and 1 from 0.02, "0.02" or "2%". Raises ValueError."""
    text = "" if isinstance(value, bool) else str(value).strip()
    number = _decimal(text.removesuffix("%").rstrip())
    if number is not None and text.endswith("%"):
        number = number.scaleb(-2)
    if number is None or number > 1:
        raise ValueError(f"{value!r} is not a fraction: write a share such as 2% or 0.02, from 0% to 100%")
    return float(number)


def format_fraction(fraction: float) -> str:
    """A percentage that parse_fraction reads back to exactly `fraction`: 0.02 -> "2%"."""
    return f"{_plain(Decimal(repr(fraction)).scaleb(2))}%"


def _plain(number: Decimal) -> str:
    """Digits without an exponent or idle zeros."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Position:
    """A place in a run, or a stretch of it: a fraction of its tokens (value <= 1) or a number of tokens (above).

    str() gives "15%" or "4M", which parse() reads back to an equal Position.
    """

    value: float

    @classmethod
    def parse(cls, value: object) -> Position:
        """From "15%", 0.15, "4M" or 4000000; numbers up to 1 are fractions. Raises ValueError."""
        if isinstance(value, Position):
            return value
        for parse in (parse_fraction, parse_count):
            try:
                return cls(parse(value))
            except ValueError:
                continue
        raise ValueError(
            f"{value!r} is no place in a run: write a share of it such as 15% or 0.15, or tokens such as 4M"
        )

    def tokens(self, total: int) -> int:
        """Tokens from the start of a run of `total` tokens, rounded; not clipped to the run."""
        return round(self.value * total) if self.value <= 1 else int(self.value)

    def interval(self, total: int) -> int:
        """Tokens from one time to the next, where it says how often; at least one."""
        return max(1, self.tokens(total))

    def __str__(self) -> str:
        return format_fraction(self.value) if self.value <= 1 else str(exact_count(int(self.value)))


_SECONDS = {"us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}


@dataclass(frozen=True)
class Amount:
    """A size to reach: a share of the source's (`relative`), a count, or seconds.

    str() gives "40%", "1.2M" or "12ms", which parse() reads back to an equal Amount.
    """

    value: float
    relative: bool
    timed: bool = False

    @classmethod
    def parse(cls, value: object, *, timed: bool = False) -> Amount:
        """From "40%", 0.4, "0.4x", and "1.2M" or, where `timed`, "12ms". Raises ValueError."""
        if isinstance(value, Amount):
            return value
        text = "" if isinstance(value, bool) else str(value).strip()
        try:
            share = parse_fraction(text if "%" in text else text.removesuffix("x"))  # 50%x is neither 50% nor 50x
        except ValueError:
            share = 0.0
        if 0 < share < 1:
            return cls(share, relative=True)
        if timed:
            match = re.fullmatch(r"(.*?)\s*(us|ms|s)", text)
            number = _decimal(match[1]) if match else None
            if match and number:
                return cls(float(number * _SECONDS[match[2]]), relative=False, timed=True)
            raise ValueError(
                f"{value!r} is no latency to reach: write a ratio such as 50% or 0.5x, or a time such as 12ms"
            )
        try:
            count = parse_count(text)
        except ValueError:
            count = 0
        if count > 1:
            return cls(count, relative=False)
        raise ValueError(f"{value!r} is no size to reach: write a ratio such as 50% or 0.5x, or a count such as 1.2M")

    def of(self, source: float) -> float:
        """The size where the source's is `source`; whole where that is."""
        if not self.relative:
            return self.value
        return round(self.value * source) if isinstance(source, int) else self.value * source

    def __str__(self) -> str:
        if self.relative:
            return format_fraction(self.value)
        return f"{_plain(Decimal(repr(self.value)).scaleb(3))}ms" if self.timed else str(exact_count(int(self.value)))


def format_amount(value: float, unit: str) -> str:
    """A size with its unit for people's eyes: 1234567 FLOPs -> "1.235M FLOPs", 0.0123 s -> "12.3 ms"."""
    return f"{value * 1000:.3g} ms" if unit == "s" else f"{format_count(int(value))} {unit}"
