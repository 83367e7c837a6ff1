"""The versions of a model that a sweep compares.

A version is the checkpoint itself, a copy with fewer bits that `flashmoe.quantize` writes, or
another checkpoint of the same model.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..catalog import find
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.safetensors_writer import SHARD_NBYTES
from ..errors import SettingError
from ..quantize.recipe import QuantizePlan, Recipe, make_plan

OWN = "own"
_RECIPE = re.compile(r"\d+(/\d+){0,2}")

#: What must be the same for two checkpoints to be versions of one model.
_SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Version:
    """A version of a model: either `checkpoint` or `plan` is set.

    Attributes:
        name: the version as the user named it.
        checkpoint: the checkpoint, if it is on the disk already.
        plan: what `write` writes, if not.
    """

    name: str
    checkpoint: Checkpoint | None = None
    plan: QuantizePlan | None = None

    @property
    def key(self) -> str:
        """The name under which results are stored. For another checkpoint it has its files too."""
        if self.checkpoint is None or self.name == OWN:
            return self.name
        return f"{self.name}@{self.checkpoint.files_identity[:12]}"

    @property
    def nbytes(self) -> int:
        """Bytes that `write` writes."""
        return 0 if self.plan is None else self.plan.nbytes()[1]

    def write(
        self, directory: Path, advance: Callable[[int], None] = lambda done: None
    ) -> Checkpoint:
        """Write the version to a directory unless it is on the disk already, and return it.

        Args:
            advance: called with the amount of work done, in work units of the plan.

        Raises:
            QuantizeError: the disk has too little space, or the directory holds something else.
        """
        if self.plan is None:
            assert self.checkpoint is not None, "a version has a plan or a checkpoint"
            return self.checkpoint
        from ..quantize import writer  # late: numba

        # config.json is written last: where it exists, the version is complete.
        if not (directory / "config.json").is_file():
            settings = writer.run_settings(self.plan, SHARD_NBYTES, None)
            writer.prepare_directory(self.plan, directory, settings)
            note = {
                "source": self.plan.checkpoint.path.absolute().name,
                "recipe": asdict(self.plan.recipe),
                "calibration": None,
            }
            writer.Quantizer(self.plan, directory, note, advance).write()
        return Checkpoint.open(directory)

    def discard(self, directory: Path) -> None:
        """Remove what `write` has written."""
        if self.plan is not None:
            shutil.rmtree(directory, ignore_errors=True)


def read_versions(names: list[str], source: Checkpoint) -> list[Version]:
    """Return the named versions without duplicates, the source's own bits first.

    Args:
        names: "own" for the source itself; "3" for the bits of all three matrices of an expert;
            "2/4" for gate and up, and down; "2/4/6" for dense weights too; anything else is the
            name or the directory of a checkpoint.

    Raises:
        SettingError: bits that are not fewer than the source's, or a checkpoint of another model.
    """
    versions: dict[str, Version] = {}
    for name in dict.fromkeys(names):
        version = _version(name, source)
        versions.setdefault(version.name, version)
    return sorted(versions.values(), key=lambda v: v.name != OWN)


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
            f"--bits {name} would not make the experts of {source.path} smaller, which have {own} "
            f"bits: use fewer bits, or {OWN}"
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
                f"{name} has {field} {theirs}, but {source.path} has {ours}: use a version of the "
                "same model, or bits such as 3 or 2/4"
            )
    return checkpoint
