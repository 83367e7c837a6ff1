"""The error that users see."""

import click

import llm


class UserError(llm.ModelError, click.ClickException):
    """Shown as one line, `Error: ...`, by every command of llm."""
