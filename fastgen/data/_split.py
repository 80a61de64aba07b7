"""How much of a sequence is held out."""

from __future__ import annotations

__all__ = ["held_out"]


def held_out(test_size: float | int, total: int, unit: str, takes: str = "an int or a float") -> int:
    """How many of `total` a `test_size` stands for; both parts get at least one."""
    if isinstance(test_size, bool) or not isinstance(test_size, (int, float)):
        raise TypeError(f"test_size: expected {takes}, got {type(test_size).__name__}")
    if total < 2:
        raise ValueError(f"test_size: expected at least 2 {unit}, one for each part, got {total}")
    if isinstance(test_size, float):
        if not 0 < test_size < 1:
            raise ValueError(f"test_size: expected a fraction between 0 and 1, or an int, got {test_size}")
        count = min(max(round(test_size * total), 1), total - 1)
    else:
        count = test_size
    if not 0 < count < total:
        raise ValueError(f"test_size: expected 1 to {total - 1:,} of the {total:,} {unit}, got {count:,}")
    return count
