"""The versions of a model that a sweep compares: its own bits, fewer ones made by `quantize`, or
other checkpoints of the same model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..catalog import find
from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..quantize.recipe import SHARD_NBYTES, Plan, Recipe, make_plan

OWN = "own"
_RECIPE = re.compile(r"\d+(/\d+){0,2}")

#: What must be the same for two checkpoints to be versions of one model.
_SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Version:
    """name: as it was asked for. checkpoint: where it is on disk already; plan: how it is made."""

    name: str
    checkpoint: Checkpoint | None = None
    plan: Plan | None = None

    @property
    def key(self) -> str:
        """The name, and for another checkpoint what its files are."""
        if self.plan is not None or self.name == OWN:
            return self.name
        return f"{self.name}@{self.checkpoint.files_identity[:12]}"

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return 0 if self.plan is None else self.plan.nbytes()[1]

    def make(
        self, directory: Path, advance: Callable[[int], None] = lambda done: None
    ) -> Checkpoint:
        """Write the checkpoint to the directory, unless it is there.

        Raises:
            QuantizeError: there is no room, or something else is there.
        """
        from ..quantize import writer as quantize  # late: numba

        # config.json comes last: with it the version is whole.
        if not (directory / "config.json").is_file():
            settings = quantize.fingerprint(self.plan, SHARD_NBYTES, None)
            quantize.begin(self.plan, directory, settings)
            source = self.plan.checkpoint.path.absolute().name
            note = {
                "source": source,
                "recipe": asdict(self.plan.recipe),
                "calibration": None,
            }
            quantize.Run(self.plan, directory, note, advance).run()
        return Checkpoint.open(directory)

    def discard(self, directory: Path) -> None:
        """Remove what `make` wrote."""
        if self.plan is not None:
            shutil.rmtree(directory, ignore_errors=True)


def read_versions(names: list[str], source: Checkpoint) -> list[Version]:
    """The versions that are asked for, each once, the source's own bits first.

    Args:
        names: "own"; bits of an expert's three matrices, as 3; of gate and up, and of down, as
            2/4; of dense weights too, as 2/4/6; else the name or directory of a checkpoint.

    Raises:
        SettingError: bits that are not fewer than the source's, or another model.
    """
    found = {}
    for name in dict.fromkeys(names):
        version = _version(name, source)
        found.setdefault(version.name, version)
    return sorted(found.values(), key=lambda v: v.name != OWN)


def _version(name: str, source: Checkpoint) -> Version:
    if name == OWN:
        return Version(OWN, source)
    if not _RECIPE.fullmatch(name):
        return Version(name, _same_model(Checkpoint.open(find(name)), source, name))
    bits = [int(x) for x in name.split("/")]
    if len(bits) == 1 and _all_bits(source) == set(bits):
        return Version(OWN, source)
    gate_up, down, *dense = bits if len(bits) > 1 else bits * 2
    plan = make_plan(source, Recipe(gate_up, down, *dense))
    before, after = plan.nbytes("gate_up", "down")
    if after >= before:
        own = "/".join(map(str, sorted(_all_bits(source))))
        raise SettingError(
            f"--bits {name} has no matrix of an expert with fewer bits than {source.path} has "
            f"({own}): give fewer, or {OWN}"
        )
    return Version(name, plan=plan)


def _all_bits(checkpoint: Checkpoint) -> set[int]:
    return {
        16 if q is None else q.bits
        for layer in checkpoint.expert_layers.values()
        for q in layer.quantization.values()
    }


def _same_model(checkpoint: Checkpoint, source: Checkpoint, name: str) -> Checkpoint:
    for field in _SAME:
        ours, theirs = (c.text_config[field] for c in (source, checkpoint))
        if ours != theirs:
            raise SettingError(
                f"{name} has {field} {theirs}, and {source.path} has {ours}: give another version "
                "of the same model, or bits such as 3 or 2/4"
            )
    return checkpoint
