"""Define the error that users of llm see."""

import click

import llm


class UserError(llm.ModelError, click.ClickException):
    """Raised for errors that every command of llm shows as one line, `Error: ...`."""
