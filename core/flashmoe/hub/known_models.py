"""The catalogue: checkpoints on the Hugging Face hub that have a name here. The data is
catalogue.json; what is not verified says so there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

#: What a name starts with that is a repository of the hub itself.
HUB = "hub:"
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub.

    nbytes: what a download takes, about; None when only the hub knows. experts: K, when the name
    stands for a pruned router, with the evidence for it. verified: whether name and size were
    compared with the hub; source: where they are from.
    """

    repo: str
    nbytes: int | None = None
    experts: int | None = None
    revision: str | None = None
    bits: int | None = None
    trained_k: int | None = None
    licence: str | None = None
    evidence: str | None = None
    verified: bool = False
    source: str | None = None

    @property
    def size(self) -> str:
        """For people."""
        return f"about {self.nbytes / 1e9:.0f} GB" if self.nbytes else "of a size the hub knows"


def from_hub_name(name: str) -> Published | None:
    """What hub:owner/name or hub:owner/name@revision stands for; None for another name."""
    match = _HUB_NAME.fullmatch(name)
    # Two dots could leave the directory that the hub's cache makes of the name.
    return None if match is None or ".." in name else Published(match[1], revision=match[2])


def _read() -> dict[str, Published]:
    data = json.loads((Path(__file__).parent / "known_models.json").read_text())
    found = {}
    for name, entry in data["models"].items():
        found[name] = _published(entry, data["families"][entry["family"]])
    for name, preset in data["presets"].items():
        of = found[preset["model"]]
        pruned = {"experts": preset["experts"], "evidence": preset["evidence"]}
        found[name] = Published(**vars(of) | pruned)
    return found


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


CATALOGUE = _read()
