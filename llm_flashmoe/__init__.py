"""The llm plugin for flashmoe: `llm -m flashmoe-demo "prompt"`.

It is a thin layer over `flashmoe.engine`. Every `llm` command loads this module, so nothing heavy
is imported before a prompt is run, and what goes wrong here is one line of text: it must not break
the commands of other models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import click

import llm
from flashmoe import catalog
from flashmoe.process_limits import fill_standard_streams

from .models import AsyncFlashMoE, FlashMoE, Options

__all__ = ["AsyncFlashMoE", "FlashMoE", "Options"]


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """Print an error of a hook as one line, and go on without what it registers."""

    @functools.wraps(hook)
    def call(*args: object) -> None:
        try:
            hook(*args)
        except Exception as e:
            text = " ".join(f"{type(e).__name__}: {e}".split())
            click.echo(f"llm goes on without flashmoe ({text[:300]})", err=True)

    return call


@llm.hookimpl
@_harmless
def register_models(register: Callable[..., None]) -> None:
    """Register every model that the catalog knows, sync and async."""
    for model in catalog.models():
        register(FlashMoE(model), AsyncFlashMoE(model), aliases=model.aliases or None)


@llm.hookimpl
@_harmless
def register_commands(cli: click.Group) -> None:
    """Register the commands of flashmoe as `llm flashmoe ...`."""
    fill_standard_streams()  # `llm` itself fails where one is closed
    from flashmoe.cli import cli as commands

    cli.add_command(commands, "flashmoe")
