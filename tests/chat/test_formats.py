"""Test the regexes of JSON schema's formats."""

import re

import pytest

from flashmoe.chat.formats import FORMATS, format_regex
from flashmoe.chat.json_schema import validation_error

GOOD = {
    "date": ["2024-02-29", "1999-12-31"],
    "time": ["23:59:60Z", "00:00:00.123456789+01:30", "12:30:00z"],
    "date-time": ["2024-01-02T03:04:05Z", "2024-01-02t03:04:05.5-08:00"],
    "duration": ["P3D", "PT1H30M", "P1Y2M3DT4H5M6S", "P2W", "PT0S"],
    "uuid": ["3f2504e0-4f89-11d3-9a0c-0305e82c3301", "F" * 8 + "-FFFF" * 3 + "-" + "f" * 12],
    "email": ["a@b.example", "first.last+tag@mail-1.example"],
    "hostname": ["localhost", "a-b.example"],
    "ipv4": ["0.0.0.0", "255.249.19.9"],
    "ipv6": ["::", "::1", "1:2:3:4:5:6:7:8", "fe80::1:2", "1::", "1:2:3:4:5:6:7::", "1::8"],
    "uri": ["https://example.org/a?b=c#d", "mailto:a@b", "urn:isbn:1"],
}
BAD = {
    "date": ["found", "2024-02-30", "2024-04-31", "2024-13-01", "2024-1-1", "2024-01-01\n"],
    "time": ["24:00:00Z", "12:00:00", "12:00Z", "12:00:00.Z", "12:00:00." + "1" * 10 + "Z"],
    "date-time": ["2024-01-02", "2024-01-02 03:04:05Z"],
    "duration": ["P", "PT", "3D", "P1D2Y", "P" + "1" * 10 + "D"],
    "uuid": ["3f2504e04f8911d39a0c0305e82c3301", "g" * 8 + "-0000" * 3 + "-" + "0" * 12],
    "email": ["a", "@b", "a@", "a b@c", "a..b@c"],
    "hostname": ["", "-a", "a-", "a_b", "a." * 20],
    "ipv4": ["256.0.0.0", "1.2.3", "01.2.3.4"],
    "ipv6": ["1", ":1", "1:2:3:4:5:6:7", "1::2::3", "12345::"],
    "uri": ["example", "http://a b", ":x"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_regex_matches_the_texts_of_its_format(name):
    regex = format_regex(name)
    schema = {"type": "string", "format": name}
    for text in GOOD[name]:
        assert re.fullmatch(regex, text), text
        assert validation_error(text, schema) is None
    for text in BAD[name]:
        assert not re.fullmatch(regex, text), text
        assert f"is not a {name}" in validation_error(text, schema)


def test_other_formats_and_values_are_not_checked():
    assert validation_error("x", {"type": "string", "format": "color"}) is None
    assert validation_error(3, {"format": "date"}) is None
    assert validation_error("x", {"format": ["date"]}) is None
