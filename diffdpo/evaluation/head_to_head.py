"""Two models on the same items: who wins how often, and can it be chance?"""

from collections.abc import Mapping
from dataclasses import asdict
from math import comb
from typing import Any

from diffdpo.evaluation.estimate import paired_difference


def head_to_head(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any]:
    """The second model against the first on the items that both have a value for, by id.

    ``{win, tie, lose, p_value, change}``: ``win`` counts items on which the second has the larger value; ``p_value`` is
    of the sign test, ``change`` the mean of second - first with its standard error.
    """
    shared = [name for name in first if name in second]
    pairs = [(first[name], second[name]) for name in shared]
    win, lose = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    return {
        "win": win,
        "tie": len(pairs) - win - lose,
        "lose": lose,
        "p_value": sign_test(win, lose),
        "change": asdict(paired_difference([a for a, _ in pairs], [b for _, b in pairs])),
    }


def sign_test(win: int, lose: int) -> float:
    """Two-sided p-value of the sign test: the chance that a fair coin, thrown win + lose times, falls at least as
    unevenly. Ties say nothing and are left out (Dixon and Mood, 1946)."""
    total = win + lose
    tail = sum(comb(total, k) for k in range(min(win, lose) + 1))
    return min(1.0, 2 * tail / 2**total)
