"""Test how JSON is parsed, and how values are checked against schemas."""

import http.server
import threading

import pytest

from flashmoe.chat.json_schema import check_schema, loads, property_schema, validation_error
from flashmoe.errors import SettingError


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e400", "", "{'a': 1}", '"\\ud800"', "1 2"])
def test_loads_refuses_text_that_is_not_json(text):
    with pytest.raises(ValueError, match="."):
        loads(text)


def test_fault_is_short_and_names_the_place():
    schema = {"properties": {"a": {"items": {"maxLength": 3}}}}
    wrong = validation_error({"a": ["abc", "x" * 10**5]}, schema)
    assert wrong.endswith("... (at ['a'][1], keyword 'maxLength')")
    assert len(wrong) < 400
    assert validation_error(3, {"type": "null"}).endswith("(at its top, keyword 'type')")
    dangling = {"$ref": "#/$defs/x", "description": "y" * 10**5}
    assert len(validation_error(3, dangling)) < 400


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (10**400, {"multipleOf": 0.5}),
        (1, {"allOf": [{"$ref": "#"}]}),
        ([[]] * 3, {"items": {"anyOf": [{"$ref": "#"}]}, "allOf": [{"$ref": "#"}]}),
    ],
)
def test_value_that_cannot_be_checked_is_reported_as_a_fault(value, schema):
    assert "cannot be validated against the schema" in validation_error(value, schema)


def test_remote_reference_is_not_fetched():
    requested_paths = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            requested_paths.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/schema.json"
        schema = {"properties": {"a": {"$ref": f"{url}#/x"}}}
        with pytest.raises(
            SettingError, match=f"it refers to '{url}#/x', and remote schemas are not fetched"
        ):
            check_schema(schema, "it")
        assert "cannot be followed: Unresolvable: http" in validation_error({"a": 1}, schema)
        wrong = validation_error(1, property_schema(schema, "a"))
        assert "cannot be followed: Unresolvable: http" in wrong
        named = {"$schema": url, "$id": url, "items": {"$id": f"{url}/2", "$ref": "3"}}
        check_schema(named, "it")
        assert "cannot be followed" in validation_error([1], named)
        server.shutdown()
    assert requested_paths == []
