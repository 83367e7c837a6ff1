"""Commands about models: what is here, what it is, and what is kept of its conversations."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .. import catalog
from ..checkpoint.capabilities import chat_template as template_of
from ..checkpoint.checkpoint import Checkpoint
from ..errors import CheckpointError, FlashMoEError
from ..generation.prompt_store import PromptStore
from ..hub import registry
from ..memory.budget import format_size
from ..terminal import json_option, record, table


@click.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models: their size, bits, K, and where they are."""
    table(
        [_summary(model) for model in catalog.models()],
        ["name", "size", "bits", "K", "where"],
        as_json=as_json,
    )
    if not as_json and sys.stdout.isatty():
        click.echo("How to get one that is not on this disk: flashmoe download NAME")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="What to call it. Default: the name of the directory.")
@click.option("--alias", "aliases", multiple=True, help="Another name; may be given again.")
@json_option
def register(path: Path, name: str | None, aliases: tuple[str, ...], as_json: bool) -> None:
    """Give the MLX checkpoint in the directory PATH a name."""
    path = path.expanduser()
    Checkpoint.open(path)  # what cannot be used is not registered
    entry = registry.add(name or path.absolute().name, path, aliases)
    found = _summary(catalog.model(entry.name))
    if as_json:
        record(found, as_json=True)
    else:
        click.echo(f"{entry.name}: {found['size']}, {found['bits']:g} bits, K={found['K']}")


@click.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Forget the model NAME. Its files stay where they are."""
    entry = registry.remove(name)
    if as_json:
        record({"name": entry.name, "path": str(entry.path)}, as_json=True)
    else:
        click.echo(f"{entry.name} is forgotten; its files are still in {entry.path}")


@click.command()
@click.argument("name")
@json_option
def info(name: str, as_json: bool) -> None:
    """Show what the model NAME is made of."""
    model = catalog.model(name)
    checkpoint = Checkpoint.open(catalog.find(name))
    layer = next(iter(checkpoint.expert_layers.values()))
    found = {
        **_summary(model),
        "aliases": list(model.aliases),
        "family": checkpoint.model_type,
        "layers": checkpoint.num_layers,
        "experts": checkpoint.num_experts,
        "trained K": checkpoint.top_k,
        "context": checkpoint.max_context,
        "dense bytes": checkpoint.dense_nbytes,
        "expert bytes": checkpoint.expert_nbytes,
        "bytes of one expert": layer.expert_nbytes,
        "bytes of a token's experts": len(checkpoint.expert_layers)
        * checkpoint.top_k
        * layer.expert_nbytes,
        "chat template": template_of(checkpoint.path) is not None,
    }
    if not as_json:
        for field in [f for f in found if "bytes" in f]:
            found[field] = format_size(found[field])
        found.pop("size")
    record(found, as_json=as_json)


@click.command("chat-template")
@click.argument("name")
@json_option
def chat_template(name: str, as_json: bool) -> None:
    """Print the chat template of the model NAME, as its checkpoint has it."""
    path = catalog.find(name)
    template = template_of(path)
    if template is None:
        raise CheckpointError(f"{path} has no chat template: download its chat_template.jinja")
    if as_json:
        record({"name": name, "path": str(path), "template": template}, as_json=True)
    else:
        click.echo(template)


@click.group(invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> None:
    """The states of conversations on disk: show them (the default), or clear them."""
    if context.invoked_subcommand is None:
        context.invoke(cache_show, as_json=False)


@cache.command("show")
@json_option
def cache_show(as_json: bool) -> None:
    """Show how much is kept, and where."""
    store = PromptStore()
    states = store.states()
    found = {
        "path": str(store.directory),
        "states": len(states),
        "bytes": sum(s.nbytes for s in states),
        "limit": store.limit,
        "longest": max((s.tokens for s in states), default=0),
    }
    if not as_json:
        found |= {name: format_size(found[name]) for name in ("bytes", "limit")}
        found["longest"] = f"{found['longest']} tokens"
    record(found, as_json=as_json)


@cache.command("clear")
@json_option
def cache_clear(as_json: bool) -> None:
    """Remove all of them. Conversations go on; their next turn reads them again."""
    store = PromptStore()
    freed = store.clear()
    if as_json:
        record({"path": str(store.directory), "freed": freed}, as_json=True)
    else:
        click.echo(f"{format_size(freed)} freed in {store.directory}")


COMMANDS = (list_models, register, remove, info, cache, chat_template)


def _summary(model: catalog.Model) -> dict:
    """What `list` says of a model; a checkpoint that is broken is listed with its fault."""
    found = {"name": model.name, "source": model.source}
    if model.published is not None:
        found |= _origin(model.published)
    if model.path is None:
        return found | {
            "size": model.published.size,
            "bytes": model.published.nbytes,
            "bits": model.published.bits,
            "K": model.experts or model.published.trained_k,
            "where": "not on this disk",
            "get": model.how_to_get,
        }
    found["where"] = str(model.path)
    try:
        checkpoint = Checkpoint.open(model.path)
    except FlashMoEError as e:
        return found | {"size": None, "error": str(e), "where": f"{model.path}: {e}"}
    nbytes = sum(file.stat().st_size for file in checkpoint.files)
    return found | {
        "size": format_size(nbytes),
        "bytes": nbytes,
        "bits": checkpoint.expert_bits,
        "K": model.experts or checkpoint.top_k,
    }


def _origin(published: catalog.Published) -> dict:
    """Where it is from, and what is known of it; only what is."""
    found = {name: getattr(published, name) for name in ("repo", "revision", "licence", "evidence")}
    found = {name: value for name, value in found.items() if value is not None}
    if published.source is not None:
        found |= {"verified": published.verified, "catalogue": published.source}
    return found
