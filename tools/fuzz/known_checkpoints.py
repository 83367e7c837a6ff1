"""Checkpoints that got through once: each run begins with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .checkpoint_mutations import SPECIAL, STEPS
from .templates import BOMBS
from .toy_files import TEMPLATE, VOCAB, Mutant, Weights

_DEEP = b"[" * 100_000


def _config(**fields: Any) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        mutant.documents["config.json"] = mutant.documents["config.json"] | fields

    return change


def _tokenizer(word: int, value: int) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        document = mutant.documents["tokenizer.json"]
        vocab = document["model"]["vocab"]
        vocab = vocab | {list(vocab)[word]: value}
        mutant.documents["tokenizer.json"] = document | {
            "model": document["model"] | {"vocab": vocab}
        }

    return change


def _all_ids(shift: int) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        document = mutant.documents["tokenizer.json"]
        vocab = {word: i + shift for word, i in document["model"]["vocab"].items()}
        added = [token | {"id": token["id"] + shift} for token in document["added_tokens"]]
        model = document["model"] | {"vocab": vocab}
        mutant.documents["tokenizer.json"] = document | {"model": model, "added_tokens": added}

    return change


def _step(number: int) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        name, value = STEPS[number]
        mutant.documents["tokenizer.json"] = mutant.documents["tokenizer.json"] | {name: value}

    return change


def _raw(name: str, content: bytes) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        mutant.raw[name] = content

    return change


def _generation(text: str) -> Callable[[Mutant], None]:
    return _raw("generation_config.json", text.encode())


def _dtype(old: str, new: str) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        for name, weights in mutant.weights.items():
            header = {
                tensor: entry | {"dtype": new}
                if "norm" in tensor and entry.get("dtype") == old
                else entry
                for tensor, entry in weights.header.items()
            }
            mutant.weights[name] = Weights(header, weights.data)

    return change


def _template(text: str) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        mutant.template = text

    return change


def _special(name: str, kind: str) -> Callable[[Mutant], None]:
    def change(mutant: Mutant) -> None:
        mutant.raw[name] = SPECIAL[kind]

    return change


#: A name, the toy, and the change.
KNOWN: list[tuple[str, str, Callable[[Mutant], None]]] = [
    ("a word beyond the vocabulary", "qwen3", _tokenizer(64, VOCAB + 10**6)),
    ("all ids beyond the vocabulary", "qwen3_5", _all_ids(VOCAB)),
    ("all ids far beyond the vocabulary", "next", _all_ids(10**7)),
    *[(f"intermediate_size {n}", "qwen3", _config(intermediate_size=n)) for n in (1, 3, 100)],
    *[
        (f"eos_token_id {value}", "qwen3", _config(eos_token_id=value))
        for value in ("x", [None], {"a": 1}, [-1], [1.5], VOCAB, [10**9])
    ],
    ("generation_config.json is deep", "qwen3", _raw("generation_config.json", _DEEP)),
    ("temperature 1e309", "qwen3", _generation('{"temperature": 1e309}')),
    ("temperature 1e-40", "qwen3", _generation('{"do_sample": true, "temperature": 1e-40}')),
    *[
        (f"{name} {value}", "qwen3", _config(**{name: value}))
        for name in ("rope_theta", "rms_norm_eps", "partial_rotary_factor")
        for value in ("@@raw3@@", "@@raw4@@", "x", -1, 0, [1], 10**400)
    ],
    ("norms in I16", "qwen3", _dtype("BF16", "I16")),
    ("norms in U16", "qwen3_5", _dtype("BF16", "U16")),
    *[(f"template {i}", "qwen3", _template(text)) for i, text in enumerate(BOMBS)],
    ("an empty template", "qwen3", _template("")),
    ("a template of nothing", "qwen3", _template("{{ '' }}")),
    *[(f"step {i} of the tokenizer", "qwen3", _step(i)) for i in range(len(STEPS))],
    *[
        (f"{name} is {kind}", "shards", _special(name, kind))
        for name in ("tokenizer.json", "generation_config.json", TEMPLATE, "config.json")
        for kind in ("a FIFO", "a link to /dev/zero", "a directory", "3 GB of zeros")
    ],
]


def known(number: int, toys: dict[str, Mutant]) -> Mutant:
    """Return the known checkpoint of a number below `len(KNOWN)`."""
    name, toy, change = KNOWN[number]
    mutant = toys[toy].copy()
    change(mutant)
    mutant.changes.append(f"known: {name}")
    return mutant
