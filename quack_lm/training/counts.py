"""Counts as short text."""


def format_count(value: float) -> str:
    """Three significant digits and a unit: 412_345 -> '412k', 1_040_000_000 -> '1.04B'."""
    rounded = float(f"{value:.3g}")
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g}{unit}"
    return f"{rounded:.3g}"
