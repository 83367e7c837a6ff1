"""Define the options that several commands share, and build `EngineOptions` from them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from .. import catalog
from ..options import ACTIVATIONS, IO_MODES, EngineOptions

_SHARED: dict[str, dict[str, Any]] = {
    "memory": {
        "metavar": "SIZE",
        "show_default": "what the machine can spare",
        "help": "Limit the peak memory of the process, such as 8GB.",
    },
    "slots": {
        "metavar": "N",
        "type": int,
        "help": "Keep this many experts per layer in memory, instead of --memory.",
    },
    "context": {
        "metavar": "TOKENS",
        "type": int,
        "show_default": "what is usual, or what fits",
        "help": "Keep memory for this many tokens of prompt and answer. On a GPU longer ones are "
        "refused if they do not fit.",
    },
    "experts": {
        "metavar": "K",
        "type": int,
        "show_default": "as trained",
        "help": "Use K experts per token. Fewer than trained is faster, but not exact.",
    },
    "depth": {
        "metavar": "N",
        "type": int,
        "show_default": "as `flashmoe bench disk` measured, or 8",
        "help": "Keep this many reads in flight at the drive.",
    },
    "io": {
        "type": click.Choice(IO_MODES),
        "show_default": "as `flashmoe bench disk` measured, or what suits the platform",
        "help": "Choose how experts are read from the drive.",
    },
    "activations": {
        "type": click.Choice(ACTIVATIONS),
        "default": "float32",
        "show_default": True,
        "help": "Choose the precision of activations in decode. int8 is faster on a CPU, but not "
        "exact.",
    },
    "batch": {
        "metavar": "N",
        "type": int,
        "show_default": "16, or fewer if memory is short",
        "help": "Answer at most this many requests together.",
    },
    "cluster": {
        "metavar": "SHARES",
        "help": "Run on all machines of mlx.launch: 'equal', or the share of experts of each, such "
        "as 3,1.",
    },
}


def engine_options(*names: str, **help_texts: str) -> Callable[[Callable], Callable]:
    """Add the named options to a command, which gets them as one argument, `options`.

    Args:
        names: fields of `EngineOptions`; the others keep their defaults.
        help_texts: a help text by name, where the shared one does not fit the command.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def with_options(*args: Any, **values: Any) -> Any:
            options = EngineOptions(**{name: values.pop(name) for name in names})
            return command(*args, options=options, **values)

        decorated: Callable = with_options
        for name in reversed(names):
            settings = _SHARED[name]
            if name in help_texts:
                settings = settings | {"help": help_texts[name]}
            decorated = click.option(f"--{name}", **settings)(decorated)
        return decorated

    return decorate


def with_preset(options: EngineOptions, model: catalog.Model) -> EngineOptions:
    """Return the options with the K of a pruned preset, unless --experts was given."""
    return options if options.experts is not None else replace(options, experts=model.experts)
