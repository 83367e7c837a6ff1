"""Test that a request with an impossible value is refused, by the name of the option."""

import pytest

from flashmoe.errors import SettingError
from flashmoe.requests import MAX_STOP_LENGTH, MAX_STOPS, RANGES, Request, check_request

HELLO = [{"role": "user", "content": "Hello"}]
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("name", RANGES)
def test_limits_of_a_range_are_allowed_and_values_beyond_are_not(name):
    whole, low, high = RANGES[name]
    highest = high if high is not None else 10**30
    for value in (low, highest, None):
        check_request(Request(HELLO, **{name: value}))
    beyond = [low - 1, NAN, INFINITY, -INFINITY, "1", True, [1], 10**400 if high else -(10**400)]
    beyond += [low + 0.5] if whole else []
    beyond += [high * 1.001 + 1] if high is not None else []
    for value in beyond:
        with pytest.raises(SettingError, match=rf"^{name}=.* must be a") as caught:
            check_request(Request(HELLO, **{name: value}))
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e308),
        ("repetition_penalty", 1e-308),
        ("repetition_penalty", 0),
        ("messages", None),
        ("messages", "Hello"),
        ("stop", "x"),
        ("stop", ("x", "")),
        ("stop", ("x", 1)),
        ("stop", ("x",) * (MAX_STOPS + 1)),
        ("stop", ("x" * (MAX_STOP_LENGTH + 1),)),
        ("experts", 1.0),
        ("experts", True),
        ("tools", {}),
        ("tool_choice", None),
        ("parallel_tool_calls", 1),
        ("think", "yes"),
        ("cache", None),
        ("constrain", 0),
        ("response_format", "json"),
        ("response_format", {"type": ["json_object"]}),
        ("response_format", {"type": {}}),
        ("response_format", {"type": "regex", "pattern": 10**400}),
        ("response_format", {"type": "lark", "grammar": ["x" * 10**6]}),
        ("response_format", {"type": "json_schema", "schema": []}),
    ],
)
def test_impossible_value_names_its_option(name, value):
    with pytest.raises(SettingError, match=f"^{name}=") as caught:
        check_request(Request(**{"messages": HELLO} | {name: value}))
    assert len(str(caught.value)) < 400


def test_most_stop_strings_are_allowed():
    check_request(Request(HELLO, stop=("x" * MAX_STOP_LENGTH,) * MAX_STOPS))
