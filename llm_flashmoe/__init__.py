"""The llm plugin: `llm -m flashmoe-demo "prompt"`.

A thin layer over `flashmoe.engine`. Nothing heavy is imported before a prompt is run: every `llm`
command loads this module.
"""

from __future__ import annotations

import llm
from flashmoe import catalog

from .models import AsyncFlashMoE, FlashMoE, Options

__all__ = ["AsyncFlashMoE", "FlashMoE", "Options"]


@llm.hookimpl
def register_models(register):
    for model in catalog.models():
        register(FlashMoE(model), AsyncFlashMoE(model), aliases=model.aliases or None)


@llm.hookimpl
def register_commands(cli):
    from flashmoe.cli import cli as commands

    cli.add_command(commands, "flashmoe")
