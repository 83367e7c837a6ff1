"""The group of all commands."""

from __future__ import annotations

from typing import Any

import click

from ..errors import FlashMoEError
from ..process_limits import fill_standard_streams
from ..shutdown import end_on_signals
from ..system_errors import explain
from . import models
from .bench import bench
from .doctor import doctor
from .download import download
from .launch import launch
from .plan import plan
from .quantize import quantize
from .run import run
from .serve import serve
from .sweep import sweep


class Commands(click.Group):
    """A group that shows what a user can fix as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a FlashMoEError, or one of the system, ends it with status 1."""
        end_on_signals()
        fill_standard_streams()
        try:
            return super().invoke(ctx)
        except FlashMoEError as e:
            raise click.ClickException(str(e)) from e
        except (OSError, RuntimeError) as e:
            if (text := explain(e)) is None:
                raise
            raise click.ClickException(text) from e


@click.group(cls=Commands)
@click.version_option(package_name="llm-flashmoe")
def cli() -> None:
    """Run Mixture-of-Experts models that are larger than memory.

    Try it with the bundled demo model:

    \b
        flashmoe run flashmoe-demo "What is bread?"
    """


for command in (
    *models.COMMANDS,
    download,
    plan,
    quantize,
    sweep,
    bench,
    doctor,
    serve,
    launch,
    run,
):
    cli.add_command(command)
