"""Make hostile JSON: values of wrong kinds and sizes, at any place of a document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Path = tuple[str | int, ...]

#: A string of this form stands for JSON text that `json.dumps` cannot write.
_RAW = re.compile(r'"@@raw(\d+)@@"')
_RAW_TEXTS = (
    "1e309",
    "-1e309",
    "1e-400",
    "NaN",
    "Infinity",
    "-Infinity",
    "9" * 5000,
    "-0",
    "[" * 500 + "]" * 500,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    '"\\ud800"',
    '"\\u0000"',
    '{"a": 1, "a": 2}',
    "01",
    "nul",
)
_PLAIN: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    31,
    -(2**31),
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.0,
    0.5,
    -1.5,
    1e-300,
    1e300,
    "",
    "x",
    "1",
    "../../etc/passwd",
    "/dev/zero",
    "é\U0001f600\u202e",
    "%s%n{}{0}",
    "a" * 100_000,
    [],
    {},
    [None],
    [[]],
    [0],
    [-1],
    ["x"],
    {"": None},
    {"a": 1},
    list(range(1000)),
)


def dumps(value: Any) -> str:
    """Return JSON text, in which placeholders of `junk` have been replaced by their text."""
    text = json.dumps(value, ensure_ascii=True)
    return _RAW.sub(lambda match: _RAW_TEXTS[int(match[1])], text)


def junk(random: Random) -> Any:
    """Return a hostile value; `dumps` writes it."""
    if random.random() < 0.25:
        return f"@@raw{random.randrange(len(_RAW_TEXTS))}@@"
    return random.choice(_PLAIN)


def near(random: Random, value: Any) -> Any:
    """Return a value that is close to a valid one: another number, kind or length."""
    if isinstance(value, bool):
        return random.choice([not value, int(value), str(value)])
    if isinstance(value, int):
        others = [value + 1, value - 1, value * 2, value // 2, -value, value * 2**20, 0, 1]
        return random.choice([*others, float(value), str(value), [value], value + 0.5])
    if isinstance(value, float):
        return random.choice([-value, value * 1e30, value * 1e-30, 0.0, int(value), str(value)])
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return random.choice(
            [value[:cut], value + value, value[cut:], value + "\0", [value], value.upper()]
        )
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        return random.choice(
            [value[:at], value + value[at:], value[::-1], dict(enumerate(value)), value[at]]
        )
    if isinstance(value, dict) and value:
        name = random.choice(list(value))
        return random.choice(
            [{k: v for k, v in value.items() if k != name}, list(value), value | {name + "x": 1}]
        )
    return junk(random)


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of each value inside a JSON document, the document itself first."""
    yield path
    items: Iterator[tuple[str | int, Any]] | enumerate = iter(())
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, list):
        items = enumerate(value[:50])
    for name, inner in items:
        yield from places(inner, (*path, name))


def get(value: Any, path: Path) -> Any:
    """Return the value at a path."""
    for name in path:
        value = value[name]
    return value


def put(value: Any, path: Path, new: Any) -> Any:
    """Return a document whose value at a path is `new`; containers are copied on the way."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def drop(value: Any, path: Path) -> Any:
    """Return a document without what is at a path of at least one name."""
    outer = get(value, path[:-1])
    copy = dict(outer) if isinstance(outer, dict) else list(outer)
    del copy[path[-1]]
    return put(value, path[:-1], copy)


def mutate(random: Random, value: Any) -> tuple[Any, str]:
    """Change one place of a JSON document.

    Returns:
        The new document, and a description of the change.
    """
    every = list(places(value))
    path = random.choice(every[1:] or every)
    old = get(value, path)
    kind = random.choice(["junk", "junk", "near", "near", "drop", "swap", "rename", "wrap"])
    if kind == "drop" and path:
        return drop(value, path), f"drop {_show(path)}"
    if kind == "swap":
        other = random.choice(every)
        return put(value, path, get(value, other)), f"{_show(path)} = value of {_show(other)}"
    if kind == "rename" and path and isinstance(outer := get(value, path[:-1]), dict):
        name = random.choice([*outer, "", "a" * 3000, f"{path[-1]} ", str(path[-1]).upper()])
        renamed = {(name if k == path[-1] else k): v for k, v in outer.items()}
        return put(value, path[:-1], renamed), f"rename {_show(path)} to {name[:40]!r}"
    if kind == "wrap":
        new = random.choice([[old], {"value": old}, [old, old]])
    else:
        new = near(random, old) if kind == "near" else junk(random)
    return put(value, path, new), f"{_show(path)} = {_cut(new)}"


def spoil_text(random: Random, text: str) -> tuple[bytes, str]:
    """Return the bytes of a text file after damage that no parser of its format expects."""
    raw = text.encode("utf-8", "surrogatepass")
    at = random.randrange(len(raw) + 1)
    changes: list[tuple[str, Callable[[], bytes]]] = [
        (f"cut at {at}", lambda: raw[:at]),
        ("emptied", lambda: b""),
        (f"byte {at} flipped", lambda: raw[:at] + bytes([random.randrange(256)]) + raw[at + 1 :]),
        (f"bytes inserted at {at}", lambda: raw[:at] + random.randbytes(9) + raw[at:]),
        ("byte order mark", lambda: b"\xef\xbb\xbf" + raw),
        ("UTF-16", lambda: text.encode("utf-16", "surrogatepass")),
        ("twice", lambda: raw + raw),
        ("null", lambda: b"null"),
        ("list", lambda: b"[1, 2]"),
        ("number", lambda: b"3"),
        ("text", lambda: b'"x"'),
        ("deep", lambda: b"[" * 100_000),
        ("deep objects", lambda: b'{"a":' * 100_000),
        ("deep inside", lambda: raw.replace(b":", b":" + b"[" * 50_000, 1)),
        ("zeros", lambda: bytes(len(raw))),
        ("spaces", lambda: raw + b" " * 3_000_000),
        ("random bytes", lambda: random.randbytes(200)),
    ]
    name, change = random.choice(changes)
    return change(), name


def _show(path: Path) -> str:
    return ".".join(map(str, path))[:80] or "all"


def _cut(value: Any) -> str:
    if isinstance(value, str) and (match := _RAW.fullmatch(f'"{value}"')):
        value = _RAW_TEXTS[int(match[1])]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
