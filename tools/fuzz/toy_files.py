"""Hold small checkpoints in memory, and write mutated copies of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .values import dumps

INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    INDEX,
)
TEMPLATE = "chat_template.jinja"
ADDED = 9  # the demo's special tokens
VOCAB = 320

#: Arguments of `toys.write_chat_toy` by name, and further down of `moe_types.write_moe`. Each is
#: small, so that most of the time goes into what reads the files and not into the model.
_SMALL: dict[str, Any] = {
    "layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "top_k": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}
TOYS: dict[str, dict[str, Any]] = {
    "qwen3_5": _SMALL | {"family": "qwen3_5_moe", "full_attention_interval": 2},
    "shards": _SMALL | {"family": "qwen3_5_moe", "full_attention_interval": 2, "shards": 3},
    "next": _SMALL | {"family": "qwen3_next", "full_attention_interval": 2, "dense_layer": True},
    "qwen3": _SMALL | {"family": "qwen3_moe", "dense_layer": True},
    "plain": _SMALL | {"family": "qwen3_moe", "bits": None},
    "tied": _SMALL | {"family": "qwen3_moe", "tie": True, "bits": 8, "dtype": "float16"},
}
#: Other model types of mlx-lm, which flashmoe knows no number of by name: arguments of
#: `moe_types.write_moe`.
TOYS |= {
    name: {"type": name, "vocab_size": VOCAB} | arguments
    for name, arguments in {
        "gpt_oss": {"bits": 4, "mode": "mxfp4"},
        "deepseek_v3": {"bits": 4},
        "mixtral": {},
        "glm4_moe": {"bits": 4},
        "nemotron_h": {},
        "qwen2_moe": {"bits": 4, "mode": "nvfp4"},
        "longcat_flash": {},
        "phixtral": {"num_vocab": VOCAB},
        "minimax": {"bits": 8, "mode": "mxfp8"},
    }.items()
}


@dataclass
class Weights:
    """One safetensors file: its header as JSON, the length before it, and its data.

    Attributes:
        header: the parsed header.
        data: the bytes behind it.
        text: bytes of a header that is no JSON; None writes `header`.
        length: the length that the file states; None states the true one.
    """

    header: dict
    data: bytes
    text: bytes | None = None
    length: int | None = None

    @classmethod
    def read(cls, file: Path) -> Weights:
        """Read a valid file."""
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        return cls(json.loads(raw[8:end]), raw[end:])

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        text = dumps(self.header).encode() if self.text is None else self.text
        length = len(text) if self.length is None else self.length
        return (length % 2**64).to_bytes(8, "little") + text + self.data


@dataclass
class Mutant:
    """A checkpoint of which some files differ from a toy's.

    Attributes:
        toy: the directory of the valid checkpoint.
        documents: the content of its JSON files, by name.
        weights: its safetensors files, by name.
        template: the chat template.
        raw: what replaces whole files, by name: bytes, or a function that makes the file at a path.
            None removes the file.
        changes: what was changed, in words.
        neutral: nothing was changed that an answer depends on.
    """

    toy: Path
    documents: dict[str, Any]
    weights: dict[str, Weights]
    template: str
    raw: dict[str, bytes | Callable[[Path], None] | None] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    neutral: bool = False

    def copy(self) -> Mutant:
        """Return a copy to mutate. Documents are replaced by mutations, never changed in place."""
        weights = {name: Weights(w.header, w.data) for name, w in self.weights.items()}
        return Mutant(self.toy, dict(self.documents), weights, self.template)

    def write(self, directory: Path, original: Mutant) -> None:
        """Write the files; those that are as in `original` become links to the toy's."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        contents: dict[str, bytes | Callable[[Path], None] | None] = {}
        for name, document in self.documents.items():
            if document is not original.documents.get(name):
                contents[name] = dumps(document).encode()
        for name, weights in self.weights.items():
            if weights != original.weights.get(name):
                contents[name] = weights.to_bytes()
        if self.template is not original.template:
            contents[TEMPLATE] = self.template.encode("utf-8", "surrogatepass")
        contents |= self.raw
        for file in self.toy.iterdir():
            if file.name not in contents:
                os.link(file, directory / file.name)
        for name, content in contents.items():
            if isinstance(content, bytes):
                (directory / name).write_bytes(content)
            elif content is not None:
                content(directory / name)


def write_toys(directory: Path, toys: Mapping[str, dict[str, Any]] = TOYS) -> None:
    """Write valid checkpoints. Needs `tests/helpers` in the path."""
    from moe_types import write_moe
    from toys import copy_tokenizer, write_chat_toy

    for name, arguments in toys.items():
        toy = directory / name
        if "type" in arguments:
            others = dict(arguments)
            write_moe(toy, others.pop("type"), **others)
            copy_tokenizer(toy)
        else:
            write_chat_toy(toy, **arguments)
        for file, document in (
            ("tokenizer.json", _small_tokenizer(json.loads((toy / "tokenizer.json").read_text()))),
            ("generation_config.json", {"eos_token_id": [VOCAB - 7, VOCAB - 9], "top_k": 20}),
        ):
            (toy / file).unlink(missing_ok=True)
            (toy / file).write_text(json.dumps(document))


def read_toy(toy: Path) -> Mutant:
    """Return a valid checkpoint in memory."""
    documents = {n: json.loads((toy / n).read_text()) for n in JSON_FILES if (toy / n).exists()}
    weights = {file.name: Weights.read(file) for file in sorted(toy.glob("*.safetensors"))}
    return Mutant(toy, documents, weights, (toy / TEMPLATE).read_text())


def _small_tokenizer(tokenizer: dict) -> dict:
    """Return the demo's tokenizer with its first words only, which is read ten times as fast."""
    model = tokenizer["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)[: VOCAB - ADDED]
    model["vocab"] = {word: i for i, word in enumerate(words)}
    pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    for i, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = VOCAB - ADDED + i
    return tokenizer
