"""Remark B.1 of the paper: how many of N tokens are hidden, were each hidden by itself with probability p."""

import math


def variance(num_tokens: int, p: float) -> float:
    """Of the number hidden |M|: N p (1 - p)."""
    return num_tokens * p * (1 - p)


def hoeffding(num_tokens: int, p: float, delta: float = 0.05) -> float:
    """|M| <= pN + sqrt(N / 2 log(2 / delta)) with probability 1 - delta."""
    return p * num_tokens + math.sqrt(num_tokens / 2 * math.log(2 / delta))
