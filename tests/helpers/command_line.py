"""Runs flashmoe's commands in this process."""

from click.testing import CliRunner

from flashmoe.cli import cli


def run(*args: object, code: int = 0) -> str:
    """Run a command that must end with the exit status `code`, and return its output.

    Args:
        args: the words of the command line, without "flashmoe".
    """
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output
