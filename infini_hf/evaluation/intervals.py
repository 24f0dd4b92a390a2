"""Intervals of 95 % for what a few documents or seeds say, without a library of statistics."""

import math


def student_quantile(freedom, confidence=0.95):
    """The `t` that a Student variable stays below in size with probability `confidence`.

    The distribution has a closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4); it is
    inverted by bisection on the angle `atan(t / √freedom)`.

    Args:
        freedom (`int`): degrees of freedom, at least 1.
        confidence (`float`, *optional*, defaults to `0.95`): between 0 and 1.

    Raises:
        ValueError: without a degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"freedom={freedom}: must be at least 1")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def within(angle, freedom):
    """The probability that `|t|` is at most `√freedom · tan(angle)`."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for step in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * step / (step + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def jackknife_interval(statistic, samples, confidence=0.95):
    """An interval for a statistic of independent samples: leave one out, Student's quantile.

    For a mean it is the usual interval. It takes ratios and shares just as well, whose numerator and denominator come
    from the same documents.

    Args:
        statistic (`callable`): a list of samples to a float.
        samples (`list`): one entry for each document or seed.
        confidence (`float`, *optional*, defaults to `0.95`): between 0 and 1.

    Returns:
        `tuple[float, float]` or `None`: `None` with fewer than two samples.
    """
    count = len(samples)
    if count < 2:
        return None
    without = [statistic(samples[:index] + samples[index + 1 :]) for index in range(count)]
    mean = sum(without) / count
    error = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without))
    reach = student_quantile(count - 1, confidence) * error
    centre = statistic(samples)
    return centre - reach, centre + reach
