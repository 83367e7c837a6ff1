"""Measure how often answers and tool calls fit random JSON schemas, with and without grammar.

Experts of few bits are known to write broken JSON, which a grammar prevents. For each of --count
random schemas the demo model, with experts of --bits, answers in JSON, and calls a tool whose
arguments have that schema. It does both with the grammar (the prompt of the JSON answer is then
without the schema, so that only the grammar can make it fit) and without it, with the schema in the
prompt. The last line is JSON: how many outputs are valid, invalid, and cut short at --max-tokens,
how many schemas were refused, and steps of the model per generated token.

    python benchmarks/schemas.py --count 200 --bits 4 2
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import mlx.core as mx

from flashmoe.catalog import DEMO, find
from flashmoe.chat import json_schema as schemas
from flashmoe.engine import Engine
from flashmoe.errors import OutputError, SettingError
from flashmoe.events import End, Text, ToolCall
from flashmoe.requests import Request

NAMES = ["name", "city", "count", "tags", "size", "is_open", "a-b", "Größe", "x.y", "note", "id"]
WORDS = ["red", "green", "blue", "small", "large", "north", "été", "n/a", 'say "hi"', "two words"]


def random_schema(rng: random.Random, depth: int = 2, refs: tuple[str, ...] = ()) -> dict:
    """Return a schema of bounded size: strings and arrays have a maximum length."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    if depth > 0:
        kinds += ["object", "object", "array", "array", "union", "nullable", "tuple", "types"]
    if refs:
        kinds += ["ref", "ref"]
    kind = rng.choice(kinds)

    def inner() -> dict:
        return random_schema(rng, depth - 1, refs)

    if kind == "object":
        return random_object(rng, depth - 1, refs)
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": inner(), "minItems": low, "maxItems": low + 2}
    if kind == "tuple":
        items = [inner() for _ in range(rng.randint(1, 3))]
        size = {"minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "prefixItems": items, "items": False, **size}
    if kind == "union":
        return {"anyOf": [inner() for _ in range(rng.randint(2, 3))]}
    if kind == "nullable":
        return {"anyOf": [inner(), {"type": "null"}]}
    if kind == "types":
        return {"type": rng.sample(["integer", "null", "boolean", "number"], 2)}
    if kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice(refs)}"}
    if kind == "enum":
        values = [*rng.sample(WORDS, 3), rng.randint(-9, 9), None]
        return {"enum": rng.sample(values, rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice([*WORDS, 7, -2.5, True, None])}
    if kind == "integer":
        low = rng.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
    if kind == "number":
        low = rng.randint(-100, 100)
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 50)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,8}$", "^\\d{3}-\\d{4}$"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "ipv4", "uuid"])}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(3, 30)}
    return {"type": kind}


def random_object(rng: random.Random, depth: int = 2, refs: tuple[str, ...] = ()) -> dict:
    """Return the schema of an object."""
    names = rng.sample(NAMES, rng.randint(0 if depth < 2 else 1, 4))
    properties = {name: random_schema(rng, depth, refs) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    schema = {"type": "object", "properties": properties, "required": required}
    if rng.random() < 0.3:
        schema["additionalProperties"] = False
    return schema


def random_root(seed: int) -> dict:
    """Return an object schema; half of them have definitions, of which one may be recursive."""
    rng = random.Random(seed)
    refs = ("Point", "Tree") if rng.random() < 0.5 else ()
    root = random_object(rng, 2, refs)
    if refs:
        tree = random_object(rng, 1)
        children = {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "maxItems": 1}
        tree["properties"]["children"] = children
        root["$defs"] = {"Point": random_schema(rng, 1), "Tree": tree}
    return root


def requantise_experts(source: Path, target: Path, bits: int) -> Path:
    """Write a copy of a checkpoint whose experts have the given number of bits."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    config = json.loads((source / "config.json").read_text())
    size = config["quantization"]["group_size"]
    weights = mx.load(str(source / "model.safetensors"))
    for name in [n for n in weights if ".switch_mlp." in n and n.endswith(".weight")]:
        path = name.removesuffix(".weight")
        parts = [weights[f"{path}.{p}"] for p in ("weight", "scales", "biases")]
        plain = mx.dequantize(*parts, group_size=size, bits=config["quantization"]["bits"])
        parts = mx.quantize(plain, group_size=size, bits=bits)
        names = [f"{path}.{p}" for p in ("weight", "scales", "biases")]
        weights |= dict(zip(names, parts, strict=True))
        for key in ("quantization", "quantization_config"):
            config[key][path] = {"group_size": size, "bits": bits}
    mx.eval(weights)
    file.unlink()
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def request_of(schema: dict, kind: str, seed: int, *, constrain: bool, max_tokens: int) -> Request:
    """Return a request for JSON that fits a schema, or for a tool call with such arguments."""
    common = {"seed": seed, "max_tokens": max_tokens, "constrain": constrain}
    if kind == "schema":
        text = "Answer with a JSON document."
        if not constrain:
            text = f"Answer with JSON only, of this schema: {json.dumps(schema)}"
        wanted = {"type": "json_schema", "schema": schema}
        return Request([{"role": "user", "content": text}], response_format=wanted, **common)
    tool = {"name": "save", "description": "Save a record.", "parameters": schema}
    messages = [{"role": "user", "content": "Call the tool save with some record."}]
    return Request(messages, tools=[tool], tool_choice="save", **common)


def outcome(engine: Engine, request: Request, schema: dict) -> tuple[str, End | None]:
    """Return "valid", "invalid", "cut short" or "refused", and the last event of the answer."""
    try:
        *events, end = engine.stream(request)
    except SettingError:
        return "refused", None
    except OutputError as e:
        return ("cut short" if "cut short" in str(e) else "invalid"), None
    if end.finish_reason == "length":
        return "cut short", end
    if request.tools:
        calls = [e for e in events if isinstance(e, ToolCall)]
        # The engine validates the arguments too; this is an independent check.
        good = calls and all(
            c.error is None and schemas.validation_error(c.arguments, schema) is None for c in calls
        )
        return ("valid" if good else "invalid"), end
    try:
        value = json.loads("".join(e.text for e in events if isinstance(e, Text)))
    except ValueError:
        return "invalid", end
    return ("valid" if schemas.validation_error(value, schema) is None else "invalid"), end


def run(engine: Engine, kind: str, seeds: range, free: int, max_tokens: int) -> dict:
    """Count outcomes with the grammar, and for the first `free` seeds without it too."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    steps, tokens = 0, 0
    for seed in seeds:
        schema = random_root(seed)
        for constrain in (True, False) if seed - seeds.start < free else (True,):
            request = request_of(schema, kind, seed, constrain=constrain, max_tokens=max_tokens)
            verdict, end = outcome(engine, request, schema)
            counts[constrain][verdict] += 1
            if end is not None and constrain:
                steps, tokens = steps + end.steps, tokens + end.generated_tokens
    ratio = round(steps / max(tokens, 1), 3)
    return {"grammar": counts[True], "no grammar": counts[False], "steps_per_token": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--free", type=int, default=50, help="schemas tried without a grammar too")
    parser.add_argument("--kinds", nargs="+", default=["schema", "tool"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--max-tokens", type=int, default=250)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for bits in args.bits:
            path = find(DEMO)
            if bits != 4:
                path = requantise_experts(path, Path(scratch) / f"{bits}bit", bits)
            with Engine(path, slots=64, prompt_store=0) as engine:
                for kind in args.kinds:
                    name = f"{bits}bit {kind}"
                    seeds = range(args.count)
                    results[name] = run(engine, kind, seeds, args.free, args.max_tokens)
                    print(name, json.dumps(results[name]), flush=True)
    print(json.dumps({"benchmark": "schemas", "count": args.count, **results}))


if __name__ == "__main__":
    main()
