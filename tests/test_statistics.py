"""philox-v1 masks look random: at least 2**28 bits a rate, everything within 5 standard deviations."""

import math

import numpy as np
import pytest

import pyreg

N = 1 << 28
KEY = 0xFEED_5EED_0000_0001
RATES = [0.5, 0.25, 0.1, 1 / 3, 0.9, 1e-4, 1 - 1e-6]


def packed(rate, key=KEY, offset=0, n=N):
    return pyreg.dropout_mask(n, rate, key=key, offset=offset, packed=True)


ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint64)


def count(bits):
    """Number of ones in packed bits."""
    return int(sum(ONES @ np.bincount(part, minlength=256).astype(np.uint64) for part in np.array_split(bits, 16)))


def within_5_sigma(ones, n, p):
    assert abs(ones - n * p) <= 5 * math.sqrt(n * p * (1 - p)), (ones, n * p)


@pytest.mark.parametrize("rate", RATES)
def test_frequency(rate):
    within_5_sigma(count(packed(rate)), N, 1 - rate)


@pytest.mark.parametrize("rate", [0.5, 0.1, 1 / 3, 1e-4])
def test_lags(rate):
    """P(i and i + lag both dropped) = rate ** 2: neighbours, and the distances of the layout of counters."""
    dropped = ~packed(rate)
    for lag in (1, 2, 7, 31, 32, 33, 64, 128, 255, 256, 512, 1024, 4096, 65536):
        shifted = ~packed(rate, offset=lag)
        # Pairs that share an element are not independent: the variance of their number is not that of N coins.
        q = rate**2
        sigma = math.sqrt(N * (q - q**2 + 2 * (rate**3 - q**2)))
        assert abs(count(dropped & shifted) - N * q) <= 5 * sigma, lag


@pytest.mark.parametrize("rate", [0.5, 0.1, 1 / 3])
def test_adjacent_keys(rate):
    dropped = ~packed(rate)
    for other in (KEY + 1, KEY ^ 1 << 32, KEY ^ 1 << 63, KEY + (1 << 32) + 1):
        within_5_sigma(count(dropped & ~packed(rate, key=other)), N, rate**2)


@pytest.mark.parametrize("digits", [8, 16])
def test_ties(digits):
    """Of the elements whose first digits are those of the rate, the right part is dropped."""
    step = 2.0**-digits
    for k, part in ((25, 0.6), (100, 1 / 3), (200, 0.05)):
        low, rate, high = k * step, (k + part) * step, (k + 1) * step
        below = count(~packed(low))
        ties = count(~packed(high)) - below
        within_5_sigma(ties, N, step)
        within_5_sigma(count(~packed(rate)) - below, ties, part)


def test_runs():
    """The number of runs of equal bits at rate 0.5 (Wald and Wolfowitz, 1940)."""
    bits = packed(0.5)
    within_5_sigma(count(bits ^ packed(0.5, offset=1)), N, 0.5)


def test_words_are_uniform():
    """Chi-squared of 16-bit words of the mask at rate 0.5: 65,535 degrees of freedom, nearly normal."""
    histogram = np.bincount(packed(0.5).view(np.uint16), minlength=1 << 16)
    mean = N / 16 / 65536
    chi2 = float(((histogram - mean) ** 2 / mean).sum())
    assert abs(chi2 - 65535) <= 5 * math.sqrt(2 * 65535)


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
def test_frequency_of_2_to_32_bits(rate):
    ones = sum(count(packed(rate, offset=start, n=N)) for start in range(0, 1 << 32, N))
    within_5_sigma(ones, 1 << 32, 1 - rate)
