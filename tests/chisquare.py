"""A chi-square test of counts against exact probabilities."""

from __future__ import annotations

from collections.abc import Mapping

from scipy.stats import chisquare


def p_value(counts: Mapping[object, int], expected: Mapping[object, float]) -> float:
    """p of `counts` under the probabilities `expected`; cells expected below 5 are pooled into one."""
    total = sum(counts.values())
    assert abs(sum(expected.values()) - 1.0) < 1e-5
    assert not set(counts) - {cell for cell, p in expected.items() if p > 0}, "something impossible came out"
    observed, wanted, rest, rest_wanted = [], [], 0, 0.0
    for cell, probability in expected.items():
        if probability * total >= 5:
            observed.append(counts.get(cell, 0))
            wanted.append(probability * total)
        else:
            rest += counts.get(cell, 0)
            rest_wanted += probability * total
    if rest_wanted >= 5:
        observed.append(rest)
        wanted.append(rest_wanted)
    scale = sum(observed) / sum(wanted)
    return float(chisquare(observed, [value * scale for value in wanted]).pvalue)
