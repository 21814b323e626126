"""A number that is known within a range."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.plan.rates import REST


@dataclass(frozen=True)
class Range:
    """Seconds at best, as expected, at worst."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def times(self, factor: float) -> Range:
        """As many times as long."""
        return Range(self.low * factor, self.mid * factor, self.high * factor)

    def record(self) -> dict[str, float]:
        """For JSON."""
        return {name: round(value, 3) for name, value in vars(self).items()}


NOTHING = Range(0.0, 0.0, 0.0)


def total(parts: dict[str, Range]) -> Range:
    """All parts one after another."""
    result = NOTHING
    for part in parts.values():
        result = result + part
    return result


def with_rest(parts: dict[str, Range]) -> dict[str, Range]:
    """The parts that take any time, and "rest", what nobody sums up (``rates.REST``)."""
    whole = total(parts)
    rest = Range(whole.low * REST.low, whole.mid * REST.mid, whole.high * REST.high)
    return {name: part for name, part in parts.items() if part.mid} | {"rest": rest}
