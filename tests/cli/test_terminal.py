"""How numbers are written for people."""

from math import inf

import pytest

from flashmoe.terminal import format_number, format_seconds


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 2, "0"),
        (430.4, 2, "430"),
        (12345.678, 3, "12346"),
        (2.0, 2, "2"),
        (9.96, 2, "10"),
        (0.00001, 2, "0.00001"),
        (-3.14159, 3, "-3.14"),
        (1e16, 3, "10000000000000000"),
        (inf, 3, "inf"),
    ],
)
def test_format_number_has_no_exponent(value, digits, text):
    assert format_number(value, digits) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1e-19, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.35, "350 ms"),
        (0.9996, "1 s"),
        (4.321, "4.3 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (430, "7 min 10 s"),
        (7199.7, "2 h"),
        (4320, "72 min"),
        (12960, "3 h 36 min"),
    ],
)
def test_format_seconds_chooses_the_unit(seconds, text):
    assert format_seconds(seconds) == text
