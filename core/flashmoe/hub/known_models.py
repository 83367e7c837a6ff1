"""Read the catalogue: the checkpoints on the Hugging Face hub that flashmoe knows by a name.

The data is known_models.json, which says for each entry whether it was verified.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

#: The prefix of names that are repositories of the hub.
HUB_PREFIX = "hub:"
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub.

    Attributes:
        repo: the repository, owner/name.
        nbytes: the bytes of the weights; None when only the hub knows.
        experts: K, when the name stands for a model with a pruned router.
        revision: a branch, tag or commit; None: the repository's default branch.
        bits: bits of an expert weight.
        trained_k: K that the model was trained with.
        evidence: why `experts` is good enough.
        verified: what the size was compared with: "no" for nothing, "layout" when published bytes
            equal those of the computed layout, or "hub".
        source: where name and size are from.
    """

    repo: str
    nbytes: int | None = None
    experts: int | None = None
    revision: str | None = None
    bits: int | None = None
    trained_k: int | None = None
    licence: str | None = None
    evidence: str | None = None
    verified: str = "no"
    source: str | None = None

    @property
    def size(self) -> str:
        """Return the size of a download as text for people."""
        return f"about {self.nbytes / 1e9:.0f} GB" if self.nbytes else "of a size the hub knows"


def parse_hub_name(name: str) -> Published | None:
    """Return what hub:owner/name or hub:owner/name@revision stands for; None for other names."""
    match = _HUB_NAME.fullmatch(name)
    # Two dots could lead out of the directory that the hub's cache makes from the name.
    return None if match is None or ".." in name else Published(match[1], revision=match[2])


def family_of(name: str) -> str:
    """Return the family of a checkpoint of the catalogue, such as "Qwen3-30B-A3B"."""
    return _data()["models"][name]["family"]


@cache
def _data() -> dict:
    return json.loads((Path(__file__).parent / "known_models.json").read_text())


def _read() -> dict[str, Published]:
    data = _data()
    catalogue = {}
    for name, entry in data["models"].items():
        catalogue[name] = _published(entry, data["families"][entry["family"]])
    for name, preset in data["presets"].items():
        model = catalogue[preset["model"]]
        catalogue[name] = replace(model, experts=preset["experts"], evidence=preset["evidence"])
    return catalogue


def _published(entry: dict, family: dict) -> Published:
    return Published(
        repo=entry["repo"],
        nbytes=entry["bytes"],
        bits=entry["bits"],
        trained_k=family["trained_k"],
        licence=family["licence"],
        verified=entry["verified"],
        source=entry["source"],
    )


#: The catalogue, by name.
CATALOGUE = _read()
