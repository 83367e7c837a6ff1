"""Tests sizes in bytes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import SettingError
from flashmoe.sizes import format_size, parse_size

GB = 10**9


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * GB),
        ("8 gb", 8 * GB),
        ("8G", 8 * GB),
        ("7.5GiB", 15 << 29),
        ("7.5gi", 15 << 29),
        ("800MB", 800_000_000),
        ("0.5TB", 500 * GB),
        (".5 TiB", 1 << 39),
        ("12kB", 12_000),
        ("123456789", 123_456_789),
        ("64B", 64),
        (" 2.01GB ", 2_010_000_000),  # floating point would give 1 byte less
        (17, 17),
    ],
)
def test_parse_size_accepts_units(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "-3GB", "nan", "inf", "1e9", "8 GBs", "8,5GB", "1.2.3GB", "8i", "٨GB", "0"]
    + ["0.0GB", 0, -5, True, 2.5, None],
)
def test_bad_size_is_refused(text):
    with pytest.raises(SettingError, match=r'is not a memory size: write it as "8GB"') as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (7_077_888, "7.1 MB"),
        (999_960_000, "1.0 GB"),
        (999_940_000, "999.9 MB"),
        (208_999_999_999, "209.0 GB"),
        (1_500 * GB, "1.5 TB"),
    ],
)
def test_format_size_uses_decimal_units(nbytes, text):
    assert format_size(nbytes) == text


@given(st.integers(1000, 10**15))
def test_formatted_size_parses_to_nearly_the_same(nbytes):
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.051)
