"""Mutate checkpoints: headers, data, config.json, index, tokenizer, template, kinds of files."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from . import values
from .templates import BOMBS, SNIPPETS
from .toy_files import INDEX, JSON_FILES, TEMPLATE, VOCAB, Mutant, Weights

Change = Callable[[Random, Mutant], str]

SIZES = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2}
SIZES |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}

#: Fields that config.json may have, apart from those of the toys, with values of their kinds.
OPTIONAL: dict[str, list[Any]] = {
    "eos_token_id": ["x", [None], {"a": 1}, [-1], [1.5], [VOCAB], [VOCAB + 10**6], 2**70, True],
    "rope_theta": [0, -1, "@@raw3@@", "@@raw0@@", 1e308, "x", [1], None, 10**400],
    "rope_scaling": [
        {"type": "yarn", "factor": 0, "original_max_position_embeddings": 0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 1},
        {"type": "linear", "factor": "x"},
        {"type": "longrope", "short_factor": [], "long_factor": [1]},
        {"type": ["default"]},
        {"mrope_section": [11, 11, "x"], "type": "mrope"},
        [1],
        "linear",
    ],
    "rope_parameters": [
        {"type": "default", "rope_theta": "@@raw3@@", "partial_rotary_factor": 0.25},
        {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": -3},
        {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9},
        {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": "@@raw0@@"},
        {"rope_theta": 1e4, "mrope_section": [10**9], "mrope_interleaved": True},
        {},
        [],
        "x",
    ],
    "partial_rotary_factor": [0, -1, 0.01, 7, 1e9, "@@raw3@@", "x", None, [0.5]],
    "rms_norm_eps": ["@@raw3@@", "@@raw0@@", -1, -1e-6, 0, "x", None, [1e-6], 10**400, 1e308],
    "intermediate_size": [0, 1, 3, -128, 2**31, 2**63, 1.5, "128", None, [128]],
    "hidden_act": ["gelu", "x", 3, None, ["silu"]],
    "attention_bias": [True, "x", 3, None],
    "tie_word_embeddings": [True, False, "x", 1, None, [0]],
    "use_sliding_window": [True],
    "sliding_window": [0, 1, -1, "x"],
    "layer_types": [["full_attention"], ["x", "y"], 3, []],
    "mlp_only_layers": [[0, 1], [10**9], [-1], ["x"], [1.0], 3, None],
    "decoder_sparse_step": [0, 2, 3, 2**40, 1.5, "x"],
    "norm_topk_prob": [False, "x", None, 3],
    "attn_output_gate": [False, "x"],
    "quantization": [
        {"group_size": 32, "bits": 4, "lm_head": {"bits": 1, "group_size": 7}},
        {"group_size": 32, "bits": 4, "lm_head": {"bits": 8, "group_size": 128}},
        {"group_size": 32, "bits": 4, "model.embed_tokens": False, "lm_head": False},
        {"group_size": 32, "bits": 4, "model.norm": {"bits": 4, "group_size": 32}},
        {"group_size": 64, "bits": 2},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    ],
    "quantization_config": [{"quant_method": "fp8"}, [], "x", {"group_size": 32, "bits": 4}],
    "text_config": [{}, [], None, {"vocab_size": 1}],
    "vision_config": [{"depth": 10**9}, [], 3],
    "model_file": ["x.py", "../x.py", 3, ""],
    "auto_map": [{"AutoTokenizer": "x.Tokenizer", "AutoConfig": "x.Config"}, 3],
    "architectures": [["x"], 3, None],
    "dtype": ["float64", "x", 3],
    "torch_dtype": ["float16", "os.system", 3],
    "transformers_version": ["9999", 3],
    "num_nextn_predict_layers": [10**9, -1, "x"],
    "mtp_num_hidden_layers": [1, 10**9, "x"],
}
#: Sizes that are no power of 2, multiples of none, or the wrong one of two.
ODD_SIZES = [0, 1, 2, 3, 5, 31, 33, 48, 63, 65, 96, 100, 127, 128, 2**12, 2**18, 2**24, 2**31, -64]


def json_file(random: Random, mutant: Mutant) -> str:
    """Change one place of one JSON file."""
    name = random.choice([n for n in JSON_FILES if n in mutant.documents])
    new, what = values.mutate(random, mutant.documents[name])
    mutant.documents[name] = new
    return f"{name}: {what}"


def text_file(random: Random, mutant: Mutant) -> str:
    """Damage the text of one file."""
    name = random.choice([n for n in (*JSON_FILES, TEMPLATE) if n in mutant.documents] + [TEMPLATE])
    document = mutant.documents.get(name)
    text = mutant.template if name == TEMPLATE else values.dumps(document)
    mutant.raw[name], what = values.spoil_text(random, text)
    return f"{name}: {what}"


def config_field(random: Random, mutant: Mutant) -> str:
    """Give a field of config.json a value that some code would trip over."""
    config = mutant.documents["config.json"]
    inner = config.get("text_config")
    nested = isinstance(inner, dict) and random.random() < 0.8
    target = inner if nested else config
    if not isinstance(target, dict):
        return json_file(random, mutant)
    numbers = [n for n, v in target.items() if type(v) is int]
    kind = random.random()
    if kind < 0.35 and numbers:
        name, value = random.choice(numbers), random.choice(ODD_SIZES)
    elif kind < 0.75:
        name = random.choice(list(OPTIONAL))
        value = random.choice(OPTIONAL[name])
    else:
        name = random.choice([*target, *OPTIONAL])
        value = values.near(random, target.get(name)) if kind < 0.85 else values.junk(random)
    target = target | {name: value}
    mutant.documents["config.json"] = config | {"text_config": target} if nested else target
    return f"config.json: {name} = {str(value)[:60]}"


def quantized_module(random: Random, mutant: Mutant) -> str:
    """Give one module its own quantisation in config.json."""
    config = mutant.documents["config.json"]
    if not isinstance(config, dict) or not isinstance(config.get("quantization"), dict):
        return json_file(random, mutant)
    header = random.choice(list(mutant.weights.values())).header
    name = random.choice(list(header)).rpartition(".")[0]
    entry = random.choice(
        [
            False,
            True,
            None,
            [],
            {
                "bits": random.choice([1, 2, 3, 4, 6, 8, 16, 0, -4, 4.0, "4", None]),
                "group_size": 32,
            },
            {"bits": 4, "group_size": random.choice([0, 16, 64, 128, 256, -32, 32.0, "32", None])},
            {"bits": 4, "group_size": 32, "mode": random.choice(["mxfp4", "nvfp4", "x", 3, None])},
            values.junk(random),
        ]
    )
    quantization = config["quantization"] | {name: entry}
    mutant.documents["config.json"] = config | {"quantization": quantization}
    return f"config.json: quantization[{name}] = {str(entry)[:60]}"


def header_entry(random: Random, mutant: Mutant) -> str:
    """Change dtype, shape, offsets or name of one tensor."""
    file, weights = random.choice(list(mutant.weights.items()))
    header = weights.header
    names = [n for n, e in header.items() if n != "__metadata__" and isinstance(e, dict)]
    if not names:
        return "nothing left"
    name = random.choice(names)
    entry = dict(header[name])
    kind = random.choice(["dtype", "same size", "shape", "offsets", "name", "junk", "copy", "meta"])
    try:
        new, what = _changed_entry(random, header, name, entry, kind)
    except (TypeError, ValueError, KeyError, IndexError):  # an earlier change left another kind
        new, what = header | {name: values.junk(random)}, "junk"
    mutant.weights[file] = Weights(new, weights.data)
    return f"{file}: {name}: {kind}: {what}"


def _changed_entry(
    random: Random, header: dict, name: str, entry: dict, kind: str
) -> tuple[dict, str]:
    shape, dtype = list(entry["shape"]), entry["dtype"]
    start, end = entry["data_offsets"]
    if kind == "dtype":
        entry["dtype"] = random.choice([*SIZES, "F4", "x", "", None, 3, "f32", ["F32"]])
    elif kind == "same size":
        others = [n for n, size in SIZES.items() if size == SIZES[dtype] and n != dtype]
        entry["dtype"] = random.choice(others)
        if random.random() < 0.3:
            entry["dtype"] = random.choice(list(SIZES))
            shape[-1] = shape[-1] * SIZES[dtype] // SIZES[entry["dtype"]]
            entry["shape"] = shape
    elif kind == "shape":
        at = random.randrange(len(shape))
        choices = [
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[1:],
            [],
            [0, *shape],
            [-n for n in shape],
            [float(n) for n in shape],
            [2**32, 2**32, *shape],
            [*shape[:at], shape[at] + 1, *shape[at + 1 :]],
            [*shape[:at], shape[at] // 2, 2, *shape[at + 1 :]],
            [*shape[:at], 2**62, *shape[at + 1 :]],
            [1] * random.choice([9, 40, 3000]) + shape,
        ]
        entry["shape"] = random.choice([*choices, values.junk(random)])
    elif kind == "offsets":
        other = random.choice([e for n, e in header.items() if n != "__metadata__"])["data_offsets"]
        choices = [
            [end, start],
            [start, start],
            [start + 1, end + 1],
            [start, end + 1],
            [start - 1, end],
            other,
            [2**63, 2**63 + end - start],
            [-end, -start],
            [start - 2**64, end - 2**64],
            [float(start), float(end)],
            [start],
            [start, end, end],
            {"0": start},
        ]
        entry["data_offsets"] = random.choice([*choices, values.junk(random)])
    elif kind == "name":
        part = name.split(".")
        spots = [i for i, p in enumerate(part) if p.isdigit()]
        if spots and random.random() < 0.6:
            part[random.choice(spots)] = random.choice(["99", "-1", "00", "1e3", "9" * 30, "x"])
        else:
            part[random.randrange(len(part))] = random.choice(["", "x", "weight", "scales", "\0"])
        new = ".".join(part)
        return {(new if n == name else n): e for n, e in header.items()}, f"renamed to {new[:60]}"
    elif kind == "copy":
        new = name.rpartition(".")[0] + random.choice([".bias", ".weight", ".x", ".scales"])
        return header | {new: entry}, f"also as {new}"
    elif kind == "meta":
        meta = random.choice([{"format": "pt"}, {"format": 3}, [], "x", None, values.junk(random)])
        return header | {"__metadata__": meta}, str(meta)[:60]
    else:
        return header | {name: values.junk(random)}, "junk"
    return header | {name: entry}, str({k: entry[k] for k in entry})[:160]


def header_bytes(random: Random, mutant: Mutant) -> str:
    """Damage a header as bytes, or the length before it."""
    file, weights = random.choice(list(mutant.weights.items()))
    text = values.dumps(weights.header)
    new = Weights(weights.header, weights.data)
    if random.random() < 0.5:
        new.text, what = values.spoil_text(random, text)
    else:
        wrong = [0, 1, len(text) - 1, len(text) + 1, len(text) * 2, 10**8, 2**31, 2**63, 2**64 - 1]
        new.length = random.choice(wrong)
        what = f"length {new.length}"
    mutant.weights[file] = new
    return f"{file}: header: {what}"


def data(random: Random, mutant: Mutant) -> str:
    """Change the bytes behind a header, or how many there are."""
    file, weights = random.choice(list(mutant.weights.items()))
    raw = weights.data
    at = random.randrange(len(raw) + 1)
    name, new = random.choice(
        [
            (f"cut at {at}", raw[:at]),
            ("none", b""),
            ("one byte more", raw + b"\0"),
            ("much more", raw + bytes(2_000_000)),
            ("zeros", bytes(len(raw))),
            ("NaN", b"\xff" * len(raw)),
            ("infinity", b"\x80\x7f" * (len(raw) // 2) + raw[len(raw) // 2 * 2 :]),
            ("random", random.randbytes(len(raw))),
            (f"1000 random bytes at {at}", raw[:at] + random.randbytes(1000) + raw[at + 1000 :]),
        ]
    )
    mutant.weights[file] = Weights(weights.header, new)
    return f"{file}: data: {name}"


def sized(random: Random, mutant: Mutant) -> str:
    """Change a size in config.json and, where tensors have it, in their shapes and data."""
    config = mutant.documents["config.json"]
    nested = isinstance(config, dict) and isinstance(config.get("text_config"), dict)
    target = config["text_config"] if nested else config
    if not isinstance(target, dict):
        return json_file(random, mutant)
    names = ["vocab_size", "num_experts", "intermediate_size", "moe_intermediate_size"]
    names += ["shared_expert_intermediate_size", "hidden_size", "linear_conv_kernel_dim"]
    name = random.choice([n for n in names if type(target.get(n)) is int] or ["vocab_size"])
    old = target.get(name)
    new = random.choice([1, 2, 3, 16, 32, 33, 48, 96, 128, 160, 256])
    if type(old) is not int:
        return json_file(random, mutant)
    target = target | {name: new}
    mutant.documents["config.json"] = config | {"text_config": target} if nested else target
    for file, weights in mutant.weights.items():
        mutant.weights[file] = _resized(weights, old, new)
    return f"config.json and tensors: {name} = {new}"


def _resized(weights: Weights, old: int, new: int) -> Weights:
    header, parts, at = {}, [], 0
    for name, entry in weights.header.items():
        if name == "__metadata__":
            header[name] = entry
            continue
        try:
            start, end = entry["data_offsets"]
            shape = [new if n == old else n for n in entry["shape"]]
            nbytes = SIZES[entry["dtype"]]
            for n in shape:
                nbytes *= n
            tile = weights.data[start:end]
            nbytes = max(0, min(nbytes, 10_000_000))
            raw = (tile * (nbytes // max(1, len(tile)) + 1))[:nbytes]
        except (ArithmeticError, TypeError, ValueError, KeyError):
            return weights
        header[name] = entry | {"shape": shape, "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
        at += len(raw)
    return Weights(header, b"".join(parts))


def index(random: Random, mutant: Mutant) -> str:
    """Change the index, or add one to a checkpoint that has none."""
    names = [n for w in mutant.weights.values() for n in w.header if n != "__metadata__"]
    files = list(mutant.weights)
    old = mutant.documents.get(INDEX)
    good = isinstance(old, dict) and isinstance(old.get("weight_map"), dict)
    weight_map = dict(old["weight_map"]) if good else dict.fromkeys(names, files[0])
    name = random.choice(names) if names else "x"
    wrong = ["../toy/model.safetensors", "/etc/passwd", "", ".", "config.json", "x.safetensors", 3]
    wrong += [None, "model.safetensors\0", "a" * 5000, "/dev/zero", *files, values.junk(random)]
    kind = random.choice(["file", "file", "drop", "more", "all", "junk"])
    if kind == "file":
        weight_map[name] = random.choice(wrong)
    elif kind == "drop":
        weight_map.pop(name, None)
    elif kind == "more":
        weight_map |= {f"x.{i}": files[0] for i in range(random.choice([1, 100_000]))}
    elif kind == "all":
        weight_map = dict.fromkeys(weight_map, random.choice(wrong))
    value = values.junk(random) if kind == "junk" else weight_map
    mutant.documents[INDEX] = {"metadata": {}, "weight_map": value}
    return f"{INDEX}: {kind}: {name} is in {str(weight_map.get(name))[:60]}"


TOO_HIGH = [VOCAB, VOCAB + 1, VOCAB + 1000, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, -1, 1.5, "1"]


def tokenizer(random: Random, mutant: Mutant) -> str:
    """Change ids, merges, added tokens and the steps of tokenizer.json."""
    document = mutant.documents["tokenizer.json"]
    try:
        change = random.choice([_ids, _ids, _added, _added, _steps, _steps, _model])
        document, what = change(random, document)
    except (TypeError, KeyError, ValueError, AttributeError, IndexError):
        return json_file(random, mutant)
    mutant.documents["tokenizer.json"] = document
    return f"tokenizer.json: {what}"


def _ids(random: Random, document: dict) -> tuple[dict, str]:
    vocab = dict(document["model"]["vocab"])
    word = random.choice([*list(vocab)[:80], *list(vocab)])
    kind = random.choice(["high", "high", "same", "drop", "more", "shift", "word"])
    if kind == "high":
        vocab[word] = random.choice(TOO_HIGH)
    elif kind == "same":
        vocab[word] = vocab[random.choice(list(vocab))]
    elif kind == "drop":
        del vocab[word]
    elif kind == "more":
        vocab |= {f"zz{i}": VOCAB + i for i in range(random.choice([1, 50_000]))}
    elif kind == "shift":
        by = random.choice([1, 9, 200, 10**6])
        vocab = {w: i + by for w, i in vocab.items()}
    else:
        vocab[random.choice(["a" * 10**6, "\0", "<|im_end|>", ""])] = vocab.pop(word)
    model = document["model"] | {"vocab": vocab}
    return document | {"model": model}, f"vocab: {kind}: {word!r} is {vocab.get(word)}"


def _added(random: Random, document: dict) -> tuple[dict, str]:
    added = [dict(token) for token in document["added_tokens"]]
    token = random.choice(added)
    kind = random.choice(["id", "id", "content", "flags", "more", "drop", "again"])
    if kind == "id":
        token["id"] = random.choice([*TOO_HIGH, 0, 5, added[0]["id"]])
    elif kind == "content":
        words = ["", "a", " ", "\n", "x" * 10**6, "hello", "<think>", "\0", "<|im_end|>", "{", '"']
        token["content"] = random.choice(words)
    elif kind == "flags":
        for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            token[flag] = random.choice([True, False, None, 3])
    elif kind == "more":
        count = random.choice([1, 3000])
        added += [token | {"id": VOCAB + i, "content": f"<x{i}>"} for i in range(count)]
    elif kind == "drop":
        added.remove(token)
    else:
        added.append(token | {"id": random.choice(TOO_HIGH[:8])})
    text = {k: str(v)[:40] for k, v in token.items()}
    return document | {"added_tokens": added}, f"added token: {kind}: {text}"


_LONG = "a" * 1000
#: Steps of a tokenizer that cost time or memory, or put in ids and text that the model lacks.
STEPS: list[tuple[str, Any]] = [
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated"} | {
        "invert": False
    })
    for p in ["(a+)+$", "(a|a)*b", "(?=(a+))\\1*b", "((a*)*)*b", "[", "(?<=a+)b", "", "a{99999}",
              "(" * 2000 + ")" * 2000, "(?R)", "\\g<0>", "\\p{Nope}", "(?i:" + "ſK" * 50 + ")"]
] + [
    ("pre_tokenizer", value)
    for value in [
        None,
        {"type": "Whitespace"},
        {"type": "Digits", "individual_digits": True},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 10_000},
        {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "x"},
        {"type": "FixedLength", "length": 0},
        {"type": "x"},
        3,
    ]
] + [
    ("normalizer", value)
    for value in [
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6},
        {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": _LONG}] * 4},
        {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 10_000},
        {"type": "Prepend", "prepend": "a" * 10**7},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "/////////////////////w=="},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": ""},
        {"type": "Lowercase"},
        {"type": "x"},
    ]
] + [
    ("post_processor", value)
    for value in [
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
         "pair": [], "special_tokens": {"X": {"id": "X", "ids": [i], "tokens": ["X"]}}}
        for i in (VOCAB, 10**6, 2**32 - 1)
    ] + [
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10_000,
         "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["x", 10**6], "cls": ["y", 2**32 - 1]},
        {"type": "RobertaProcessing", "sep": ["x", 10**6], "cls": ["y", 10**6],
         "trim_offsets": True, "add_prefix_space": True},
        {"type": "x"},
    ]
] + [
    ("decoder", value)
    for value in [
        None,
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 10**7},
        {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40},
        {"type": "ByteFallback"},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "x"},
    ]
] + [
    ("padding", {"strategy": {"Fixed": n}, "direction": "Left", "pad_to_multiple_of": None,
                 "pad_id": i, "pad_type_id": 0, "pad_token": "x"})
    for n in (100, 10**10) for i in (0, 10**6)
] + [
    ("padding", {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 10**10,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
    ("truncation", {"direction": "Right", "max_length": 0, "strategy": "OnlyFirst", "stride": 0}),
    ("truncation", {"direction": "Left", "max_length": 1, "strategy": "OnlyFirst", "stride": 9}),
    ("truncation", {"direction": "x"}),
]  # fmt: skip


def _steps(random: Random, document: dict) -> tuple[dict, str]:
    name, value = random.choice(STEPS)
    return document | {name: value}, f"{name} = {str(value)[:100]}"


def _model(random: Random, document: dict) -> tuple[dict, str]:
    model = dict(document["model"])
    vocab = model["vocab"]
    words = list(vocab)
    merges = list(model["merges"])
    kind = random.choice(["merges", "merges", "flags", "other"])
    if kind == "merges":
        wrong: list[Any] = [["zz", "qq"], ["a"], ["a", "b", "c"], "a b c", "ab", 3, None]
        wrong += [["", ""], [words[0], words[0]], [words[5], words[6]]]
        merges.insert(random.randrange(len(merges) + 1), random.choice(wrong))
        new = random.choice([merges, merges[::-1], merges * 1000, [], None, "#version"])
        model["merges"] = new
        return document | {"model": model}, f"merges: {str(new)[:60]}"
    if kind == "flags":
        name = random.choice([*model, "ignore_merges", "cache_capacity"])
        others = [True, 0.5, 2, -1, "x", None, "a", "</w>", 10**12]
        model[name] = random.choice(others) if name not in ("vocab", "merges") else {}
        return document | {"model": model}, f"model.{name} = {str(model[name])[:40]}"
    new = random.choice(
        [
            {"type": "WordLevel", "vocab": vocab, "unk_token": random.choice(["x", words[0]])},
            {"type": "WordPiece", "vocab": vocab, "unk_token": "x", "max_input_chars_per_word": 0,
             "continuing_subword_prefix": "##"},
            {"type": "Unigram", "vocab": [[w, -1.0] for w in words], "unk_id": 10**6},
            {"type": "Unigram", "vocab": [[w, "x"] for w in words], "unk_id": None},
            {"type": "Unigram", "vocab": [[w, 1e308] for w in words], "unk_id": 0,
             "byte_fallback": True},
            {"type": "x"},
        ]
    )  # fmt: skip
    return document | {"model": new}, f"model: {str(new)[:80]}"


TOKENIZER_FIELDS: dict[str, list[Any]] = {
    "tokenizer_class": ["x", "PreTrainedTokenizer", "LlamaTokenizer", "BertTokenizer", 3, None, ""],
    "auto_map": [{"AutoTokenizer": ["x.T", "x.T"]}, {"AutoTokenizer": "../x--x.T"}, 3],
    "eos_token": [None, "x", "", {"content": "x"}, {"__type": "AddedToken"}, 3, ["x"], "<think>"],
    "pad_token": [None, "x", {"content": "zz", "special": True, "__type": "AddedToken"}, 3],
    "bos_token": ["a", "<|im_start|>", {"content": 3, "__type": "AddedToken"}],
    "unk_token": ["zz", "", 3],
    "extra_special_tokens": [{"a": "<zz>"}, ["<zz>"], {"apply_chat_template": "x"}, 3, "x"],
    "additional_special_tokens": [["<yy>"], [3], "x"],
    "added_tokens_decoder": [
        {"5": {"content": "<zz>", "special": True}},
        {"1000000": {"content": "<zz>", "special": True}},
        {"-1": {"content": "<zz>"}},
        {"x": {"content": "<zz>"}},
        {"4294967295": {"content": "<zz>"}},
        {"5": 3},
        [],
    ],
    "chat_template": ["", "x", 3, ["x"], {"default": "x"}, [{"name": "default", "template": "x"}]],
    "model_max_length": [0, -1, 1, "x", 1e309, 10**400, None],
    "tool_parser_type": ["x", "os", "../x", "json_tools", "", 3, None, ["qwen3_coder"], "a.b"],
    "chat_template_type": ["x", "os", 3, "deepseek_v32"],
    "add_prefix_space": [True, "x"],
    "add_bos_token": [True, "x"],
    "clean_up_tokenization_spaces": [True, "x"],
    "split_special_tokens": [True],
    "padding_side": ["x", 3],
    "model_input_names": [[], 3, ["x"]],
    "vocab_file": ["/dev/zero", "../x"],
    "tokenizer_file": ["/dev/zero", "/etc/passwd", 3],
    "fast_tokenizer_files": [["x"], ["tokenizer.99.json"], 3],
    "__init__": [3],
    "from_slow": [True],
    "backend": ["x", "sentencepiece", "mistral-common", 3],
    "init_inputs": [[1, 2, 3], "x"],
    "name_or_path": ["/etc/passwd", 3],
}


def tokenizer_field(random: Random, mutant: Mutant) -> str:
    """Give a field of tokenizer_config.json a value that some code would trip over."""
    document = mutant.documents["tokenizer_config.json"]
    if not isinstance(document, dict):
        return json_file(random, mutant)
    name = random.choice(list(TOKENIZER_FIELDS))
    value = random.choice([*TOKENIZER_FIELDS[name], values.junk(random)])
    mutant.documents["tokenizer_config.json"] = document | {name: value}
    return f"tokenizer_config.json: {name} = {str(value)[:80]}"


def generation_field(random: Random, mutant: Mutant) -> str:
    """Give a field of generation_config.json a value that some code would trip over."""
    document = mutant.documents["generation_config.json"]
    if not isinstance(document, dict):
        return json_file(random, mutant)
    names = ["eos_token_id", "temperature", "top_p", "top_k", "min_p", "do_sample", "pad_token_id"]
    name = random.choice([*names, "repetition_penalty", "suppress_tokens"])
    ids = [*OPTIONAL["eos_token_id"], [], [0, VOCAB], list(range(VOCAB))]
    value = random.choice([*ids, 1e-40, 1e308, 1e-320, -1, "x", *[values.junk(random)] * 3])
    mutant.documents["generation_config.json"] = document | {name: value}
    return f"generation_config.json: {name} = {str(value)[:80]}"


def template(random: Random, mutant: Mutant) -> str:
    """Put hostile code into the chat template, or lose a part of it."""
    lines = mutant.template.split("\n")
    at = random.randrange(len(lines))
    kind = random.choice(["bomb", "snippet", "snippet", "line", "token", "alone"])
    if kind in ("bomb", "snippet", "alone"):
        code = random.choice(BOMBS if kind == "bomb" else SNIPPETS)
        mutant.template = code if kind == "alone" else "\n".join([*lines[:at], code, *lines[at:]])
        return f"{TEMPLATE}: {kind} at line {at}: {code[:80]!r}"
    if kind == "line":
        mutant.template = "\n".join([*lines[:at], *lines[at + 1 :]])
        return f"{TEMPLATE}: without line {at}"
    old = random.choice(["message", "content", "'", "}}", "%}", "{{-", "end", "loop", "if", "\n"])
    new = random.choice(["x", "", "None", "messages", "{{", "tools[9]", "content.x.y", "1/0", "\0"])
    mutant.template = mutant.template.replace(old, new, random.choice([1, -1]))
    return f"{TEMPLATE}: {old!r} becomes {new!r}"


def _socket(path: Path) -> None:
    # The name of a socket may have some 100 characters only.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 10**9)


SPECIAL: dict[str, Callable[[Path], None] | None] = {
    "missing": None,
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a link to /dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
    "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to its directory": lambda path: path.symlink_to("."),
    "3 GB of zeros": _sparse,
}
if os.path.exists("/proc/self/fd"):
    SPECIAL["a socket"] = _socket
MORE_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "x.py")
MORE_FILES += ("hf_quant_config.json", "chat_template.json", "preprocessor_config.json")
MORE_FILES += ("additional_chat_templates", "model-extra.safetensors", "tokenizer.model", INDEX)


def special_file(random: Random, mutant: Mutant) -> str:
    """Replace a file by something that is no regular file of a usual size."""
    names = [*JSON_FILES, TEMPLATE, *mutant.weights, *MORE_FILES]
    name = random.choice(names)
    kind = random.choice(list(SPECIAL))
    mutant.raw[name] = SPECIAL[kind]
    return f"{name} is {kind}"


def more_file(random: Random, mutant: Mutant) -> str:
    """Add a file that some loader looks for."""
    name = random.choice(MORE_FILES)
    contents = [b"", b"{}", b"[]", b"{", b"3", b'{"a": "<zz>"}', b'{"zz": 1000000, "a": 999999}']
    contents += [b"import os; os._exit(7)", b'{"eos_token": 3}', b'{"chat_template": "x"}']
    contents += [b'{"eos_token": {"content": "<zz>", "__type": "AddedToken"}}', b"[" * 100_000]
    content = random.choice(contents)
    mutant.raw[name] = content
    return f"{name} has {content[:40]!r}"


def neutral(random: Random, mutant: Mutant) -> str:
    """Write files in another way, with the same meaning."""
    kind = random.choice(["spaces", "order", "metadata", "fields", "indent", "comment"])
    file, weights = random.choice(list(mutant.weights.items()))
    header = weights.header
    if kind == "spaces":
        text = values.dumps(header).encode() + b" " * random.randrange(1, 64)
        mutant.weights[file] = Weights(header, weights.data, text)
    elif kind == "order":
        items = list(header.items())
        random.shuffle(items)
        mutant.weights[file] = Weights(dict(items), weights.data)
    elif kind == "metadata":
        mutant.weights[file] = Weights(header | {"__metadata__": {"a": "b"}}, weights.data)
    elif kind == "fields":
        more = {"zz_unknown": random.choice([1, None, [1], {"a": {}}, "x"])}
        mutant.documents["config.json"] = mutant.documents["config.json"] | more
    elif kind == "indent":
        name = random.choice([n for n in JSON_FILES if n in mutant.documents])
        mutant.raw[name] = values.dumps(mutant.documents[name]).replace(", ", ",\n\t ").encode()
    else:
        mutant.template = "{#- x -#}" + mutant.template
    return f"neutral: {kind}"


#: What is tried, and how often. Most headers are refused within a millisecond; a checkpoint that
#: loads takes a hundred times as long.
CHANGES: dict[Change, int] = {
    header_entry: 30,
    header_bytes: 6,
    data: 3,
    config_field: 22,
    quantized_module: 5,
    sized: 4,
    index: 5,
    json_file: 14,
    text_file: 5,
    tokenizer: 14,
    tokenizer_field: 5,
    generation_field: 4,
    template: 5,
    special_file: 4,
    more_file: 2,
    neutral: 2,
}


def mutated(random: Random, original: Mutant) -> Mutant:
    """Return a copy with one change, or with some."""
    mutant = original.copy()
    count = random.choice([1, 1, 1, 1, 1, 1, 2, 2, 3])
    for change in random.choices(list(CHANGES), list(CHANGES.values()), k=count):
        mutant.neutral = change is neutral and not mutant.changes
        try:
            mutant.changes.append(change(random, mutant))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # An earlier change left something that this one cannot be made in.
            mutant.changes.append(f"no {change.__name__}")
    return mutant
