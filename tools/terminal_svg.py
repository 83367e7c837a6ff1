"""Run the commands of the picture in README.md and draw what they print: docs/plots/terminal.svg.

    python tools/terminal_svg.py [OUT]

The commands really run, with the bundled demo model, in a directory of their own: neither the
prompt cache nor the logs of `llm` on this machine are read or written. Texts repeat, because the
temperature is 0; times and rates are those of the run.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/plots/terminal.svg"
COLUMNS = 100

COMMANDS = (
    'llm -m flashmoe-demo "What is bread?" -o temperature 0',
    "llm -m flashmoe-demo --functions 'def add(a: int, b: int) -> int: return a + b' \\\n"
    '    "What is 17 plus 25? Use the tool." --td -o temperature 0',
    'flashmoe run flashmoe-demo "What is a cat?" --slots 16 --temperature 0 --verbose',
)


def run(command: str, directory: str) -> str:
    """Return what the command prints, both streams in their order."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LLM_USER_PATH": directory,
        "FLASHMOE_CACHE": directory,
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": str(COLUMNS),
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{command}\nended with status {done.returncode}:\n{done.stdout}")
    return done.stdout.strip()


def record(commands: tuple[str, ...] = COMMANDS) -> str:
    """Run the commands one after the other; return the session as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as directory:
        for command in commands:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(run(command, directory)))
            console.print()
    # A fixed id keeps the file the same when the output is the same.
    return console.export_svg(title="flashmoe", theme=MONOKAI, unique_id="flashmoe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=OUT)
    out = parser.parse_args().out
    out.write_text(record())
    print(out)


if __name__ == "__main__":
    main()
