"""The llm plugin for flashmoe: `llm -m flashmoe-demo "prompt"`.

It is a thin layer over `flashmoe.engine`. Every `llm` command loads this module, so nothing heavy
is imported before a prompt is run.
"""

from __future__ import annotations

from collections.abc import Callable

import click

import llm
from flashmoe import catalog

from .models import AsyncFlashMoE, FlashMoE, Options

__all__ = ["AsyncFlashMoE", "FlashMoE", "Options"]


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Register every model that the catalog knows, sync and async."""
    for model in catalog.models():
        register(FlashMoE(model), AsyncFlashMoE(model), aliases=model.aliases or None)


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """Register the commands of flashmoe as `llm flashmoe ...`."""
    from flashmoe.cli import cli as commands

    cli.add_command(commands, "flashmoe")
