"""Commands about models: which there are, what they are, and their prompt cache on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .. import catalog
from ..checkpoint.capabilities import chat_template as read_chat_template
from ..checkpoint.checkpoint import Checkpoint
from ..errors import CheckpointError, FlashMoEError
from ..generation.prompt_cache import PromptStore
from ..hub import registry
from ..models.families import FAMILIES
from ..sizes import format_size
from ..terminal import (
    format_number,
    is_terminal,
    json_option,
    print_fields,
    print_json,
    print_table,
)

_NOT_HERE = "not on this disk"

# How a model takes prompts and batches through its layers: see `models.layerwise`.
_LAYERWISE_PROMPTS = "several chunks in one layer after the other: experts are read once for all"
_PROMPTS = "chunk by chunk: experts are read for each chunk of 512 tokens"
_LAYERWISE_BATCH = "together: sequences share the reads of each layer"
_BATCH = "one after another"


@click.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models that have a name.

    These are the bundled demo, the registered models and the catalogue. K is the number of experts
    per token.
    """
    summaries = [_summary(model) for model in catalog.models()]
    if as_json:
        print_json(summaries)
        return
    print_table(
        [_listed(summary) for summary in summaries],
        ("name", "size", "bits", "K", "where"),
        right=("size", "bits", "K"),
        style=_style,
    )
    if is_terminal() and any(summary["where"] == _NOT_HERE for summary in summaries):
        click.echo("\nGet one that is not on this disk: flashmoe download NAME")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--name", show_default="the name of the directory", help="Use this name for the model."
)
@click.option("--alias", "aliases", multiple=True, help="Add another name; may be repeated.")
@json_option
def register(path: Path, name: str | None, aliases: tuple[str, ...], as_json: bool) -> None:
    """Give a checkpoint on this disk a name.

    PATH is the directory of an MLX checkpoint.
    """
    path = path.expanduser()
    Checkpoint.open(path)  # what cannot be used is not registered
    entry = registry.add(name or path.absolute().name, path, aliases)
    summary = _summary(catalog.model(entry.name))
    if as_json:
        print_json(summary)
    else:
        bits = format_number(summary["bits"])
        click.echo(f"{entry.name}: {summary['size']}, {bits} bits, K={summary['K']}")


@click.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Remove the name of a model, but keep its files."""
    entry = registry.remove(name)
    if as_json:
        print_json({"name": entry.name, "path": str(entry.path)})
    else:
        click.echo(f"{entry.name} is not a name any more; its files are still in {entry.path}")


@click.command()
@click.argument("model")
@json_option
def info(model: str, as_json: bool) -> None:
    """Show the details of a model.

    MODEL is a name (see `flashmoe list`) or the directory of an MLX checkpoint.
    """
    checkpoint = Checkpoint.open(catalog.find(model))
    details = _details(catalog.model(model), checkpoint)
    if as_json:
        print_json(details)
        return
    details.pop("size")
    print_fields({name: format_size(v) if "bytes" in name else v for name, v in details.items()})


@click.command("chat-template")
@click.argument("model")
@json_option
def chat_template(model: str, as_json: bool) -> None:
    """Print the chat template of a model."""
    path = catalog.find(model)
    template = read_chat_template(path)
    if template is None:
        raise CheckpointError(
            f"{path} has no chat template: download the chat_template.jinja of the model into it"
        )
    if as_json:
        print_json({"name": model, "path": str(path), "template": template})
    else:
        click.echo(template)


@click.group(invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> None:
    """Show or clear the prompt cache on disk.

    Without a command, it is shown.
    """
    if context.invoked_subcommand is None:
        context.invoke(cache_show, as_json=False)


@cache.command("show")
@json_option
def cache_show(as_json: bool) -> None:
    """Show the size and the directory of the prompt cache."""
    store = PromptStore()
    entries = store.entries()
    summary: dict[str, Any] = {
        "path": str(store.directory),
        "states": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "limit": store.limit,
        "longest": max((entry.tokens for entry in entries), default=0),
    }
    if as_json:
        print_json(summary)
        return
    print_fields(
        {
            "path": store.directory,
            "entries": summary["states"],
            "size": format_size(summary["bytes"]),
            "limit": format_size(summary["limit"]),
            "longest": f"{summary['longest']} tokens",
        }
    )


@cache.command("clear")
@json_option
def cache_clear(as_json: bool) -> None:
    """Remove all entries of the prompt cache.

    Conversations go on as before, but their next turn processes all of their tokens again.
    """
    store = PromptStore()
    freed = store.clear()
    if as_json:
        print_json({"path": str(store.directory), "freed": freed})
    else:
        click.echo(f"{format_size(freed)} freed in {store.directory}")


COMMANDS = (list_models, register, remove, info, cache, chat_template)


def _listed(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the list."""
    row = dict(summary)
    if row["size"] is not None:
        row["size"] = row["size"].replace("about ", "~")
    if row["where"] != _NOT_HERE and "error" not in row:
        row["where"] = Path(row["where"])
    return row


def _style(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return "red"
    return "bold" if row["where"] != _NOT_HERE else ""


def _details(model: catalog.Model, checkpoint: Checkpoint) -> dict[str, Any]:
    own = checkpoint.model_type in FAMILIES
    layers = checkpoint.expert_layers
    one = next(iter(layers.values())).expert_nbytes
    return {
        **_summary(model),
        "aliases": list(model.aliases),
        "family": checkpoint.model_type,
        "layers": checkpoint.num_layers,
        "experts": checkpoint.num_experts,
        "trained K": checkpoint.top_k,
        "context": checkpoint.max_context,
        "dense bytes": checkpoint.dense_nbytes,
        "expert bytes": checkpoint.expert_nbytes,
        "bytes of one expert": one,
        "bytes of a token's experts": len(layers) * checkpoint.top_k * one,
        "chat template": read_chat_template(checkpoint.path) is not None,
        "own blocks": own,
        "prompts": _LAYERWISE_PROMPTS if own else _PROMPTS,
        "batch": _LAYERWISE_BATCH if own else _BATCH,
    }


def _summary(model: catalog.Model) -> dict[str, Any]:
    """Return what `list --json` says of a model; a broken checkpoint is listed with its error."""
    summary: dict[str, Any] = {"name": model.name, "source": model.source}
    if model.published is not None:
        summary |= _origin(model.published)
    if model.path is None:
        assert model.published is not None  # or the name would stand for nothing
        return summary | {
            "size": model.published.size,
            "bytes": model.published.nbytes,
            "bits": model.published.bits,
            "K": model.experts or model.published.trained_k,
            "where": _NOT_HERE,
            "get": model.how_to_get,
        }
    summary["where"] = str(model.path)
    try:
        checkpoint = Checkpoint.open(model.path)
    except FlashMoEError as e:
        return summary | {"size": None, "error": str(e), "where": f"{model.path}: {e}"}
    nbytes = sum(file.stat().st_size for file in checkpoint.files)
    return summary | {
        "size": format_size(nbytes),
        "bytes": nbytes,
        "bits": checkpoint.expert_bits,
        "K": model.experts or checkpoint.top_k,
    }


def _origin(published: catalog.Published) -> dict[str, Any]:
    """Return where a published checkpoint is from, and what is known about it."""
    names = ("repo", "revision", "licence", "evidence")
    known = {name: getattr(published, name) for name in names}
    origin: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
    if published.source is not None:
        origin |= {"verified": published.verified, "catalogue": published.source}
    return origin
