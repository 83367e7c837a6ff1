"""Hypothesis strategies of JSON schemas and of values that fit them."""

import json
import unicodedata

from hypothesis import strategies as st


class Shape:
    """A schema and the strategy of its values, whose keys are in the order of the schema."""

    def __init__(self, schema, values):
        self.schema, self.values = schema, values


NAMES = st.sampled_from(
    ["a", "b", "name", "a b", "a/b", "~", "%25", 'say "x"', "é", "default", "$ref"]
)
WORDS = ["", "a", "red", "two words", 'say "hi"', "été", "a\nb", "\\", "</parameter>", "日本", "3"]
# llguidance accepts U+007F in a JSON string only when it is escaped.
PLAIN = st.characters(exclude_characters="\x7f", exclude_categories=["Cs"])
NORMAL = st.text(PLAIN, max_size=8).filter(lambda s: unicodedata.is_normalized("NFC", s))
STRINGS = NORMAL | st.sampled_from(WORDS) | st.lists(st.sampled_from(WORDS)).map("\n".join)


KINDS = ["integer", "number", "string", "length", "pattern", "enum", "const", "boolean", "null"]


@st.composite
def leaves(draw):
    """Shapes without parts."""
    kind = draw(st.sampled_from(KINDS))
    low = draw(st.integers(-50, 50))
    high = low + draw(st.integers(0, 200))
    if kind == "integer":
        schema = {"type": "integer", "minimum": low, "maximum": high}
        return Shape(
            *draw(
                st.sampled_from(
                    [({"type": "integer"}, st.integers()), (schema, st.integers(low, high))]
                )
            )
        )
    if kind == "number":
        schema = {"type": "number", "minimum": low, "exclusiveMaximum": high + 1}
        return Shape(schema, st.integers(low * 4, high * 4).map(lambda n: n / 4) | st.just(low))
    if kind == "string":
        return Shape({"type": "string"}, STRINGS)
    if kind == "length":
        few = st.text(st.sampled_from("ab é\n"), min_size=1, max_size=5)
        return Shape({"type": "string", "minLength": 1, "maxLength": 5}, few)
    if kind == "pattern":
        values = draw(
            st.sampled_from(
                [("^[a-z]{2}$", ["ab", "zz"]), ("^\\d+|x", ["12", "1a", "ax b"]), ("/", ["a/b"])]
            )
        )
        return Shape({"type": "string", "pattern": values[0]}, st.sampled_from(values[1]))
    if kind in ("enum", "const"):
        some = draw(
            st.lists(st.sampled_from([*WORDS, 1, -2.5, True, None, [1]]), min_size=1, max_size=4)
        )
        schema = {"enum": some} if kind == "enum" else {"const": some[0]}
        return Shape(schema, st.sampled_from(some if kind == "enum" else some[:1]))
    values = {"boolean": st.booleans(), "null": st.none()}[kind]
    return Shape({"type": kind}, values)


@st.composite
def in_order(draw, shapes, required):
    """Objects with the required properties and some of the others, in the order of the schema."""
    return {k: draw(s.values) for k, s in shapes.items() if k in required or draw(st.booleans())}


@st.composite
def objects(draw, inner, size=3):
    """Shapes of objects with up to `size` properties."""
    shapes = draw(st.dictionaries(NAMES, inner, max_size=size))
    required = [k for k in shapes if draw(st.booleans())]
    schema = {"type": "object", "properties": {k: s.schema for k, s in shapes.items()}}
    if required or draw(st.booleans()):
        schema["required"] = required
    if draw(st.booleans()):
        schema["additionalProperties"] = False
    return Shape(schema, in_order(shapes, required))


@st.composite
def compound(draw, inner):
    """Shapes that are made of one or two inner ones."""
    kind = draw(st.sampled_from(["object", "array", "tuple", "union", "nullable", "all", "types"]))
    if kind == "object":
        return draw(objects(inner))
    if kind == "types":
        return Shape({"type": ["integer", "null"]}, st.integers() | st.none())
    one = draw(inner)
    if kind == "array":
        low, high = draw(st.sampled_from([(0, 3), (1, 1), (2, 3)]))
        schema = {"type": "array", "items": one.schema, "minItems": low, "maxItems": high}
        return Shape(schema, st.lists(one.values, min_size=low, max_size=high))
    if kind == "tuple":
        two = draw(inner)
        schema = {"type": "array", "prefixItems": [one.schema, two.schema], "items": False}
        return Shape({**schema, "minItems": 2}, st.tuples(one.values, two.values).map(list))
    if kind == "all":
        return Shape({"allOf": [one.schema], "title": "T"}, one.values)
    other = Shape({"type": "null"}, st.none()) if kind == "nullable" else draw(inner)
    return Shape({"anyOf": [one.schema, other.schema]}, one.values | other.values)


@st.composite
def object_schemas(draw):
    """Shapes of an object schema, parts of which may be references."""
    defined = draw(st.lists(st.recursive(leaves(), compound, max_leaves=3), min_size=1, max_size=2))
    names = ["A", "a/b~c %"]
    pointers = ["A", "a~1b~0c%20%25"]
    references = [
        Shape({"$ref": f"#/$defs/{p}"}, s.values) for p, s in zip(pointers, defined, strict=False)
    ]
    parts = st.recursive(leaves() | st.sampled_from(references), compound, max_leaves=5)
    root = draw(objects(parts))
    defs = {n: s.schema for n, s in zip(names, defined, strict=False)}
    return Shape({**root.schema, "$defs": defs}, root.values)


def to_json(value):
    """Return a value as JSON text, with non-ASCII characters as they are."""
    return json.dumps(value, ensure_ascii=False)


@st.composite
def altered(draw, value):
    """Values that differ from the given one in one place."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        at = draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
        return type(value)(
            {**value, at: draw(altered(value[at]))}
            if isinstance(value, dict)
            else [*value[:at], draw(altered(value[at])), *value[at + 1 :]]
        )
    if isinstance(value, dict) and draw(st.booleans()):
        return {k: v for k, v in value.items() if draw(st.booleans())} or {"zz": 1}
    if isinstance(value, list) and draw(st.booleans()):
        return [*value, *value] or [1]
    return draw(st.sampled_from([None, True, 0, 2.5, -(10**6), 10**6, "zz", "", [], [None], {}]))
