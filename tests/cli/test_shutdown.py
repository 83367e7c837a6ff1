"""A process ends within seconds of SIGTERM and of a second Ctrl-C, whatever is under way."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashmoe.catalog import DEMO

INT, TERM = signal.SIGINT, signal.SIGTERM
SCRIPTS = Path(sys.executable).parent
#: Processes end within 2 s of a signal on a quiet machine; here they may take longer.
SECONDS = 30
#: Hours in C code that keeps the interpreter, as a long import or a search for a pattern does.
HELD = "print('ready', flush=True); sum(range(10**14))\n"
FREE = "import time; print('ready', flush=True); time.sleep(300)\n"


def start(*command, **kwargs):
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def start_python(code, **kwargs):
    process = start(sys.executable, "-c", "from flashmoe.shutdown import *\n" + code, **kwargs)
    assert process.stdout.readline() == b"ready\n", process.stderr.read()
    return process


def send(process, *numbers):
    """Send signals, one after another; a process may have ended before the last one."""
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=SECONDS)
    return process.returncode, errors.decode()


@pytest.mark.parametrize("work", [HELD, FREE], ids=["held", "free"])
def test_sigterm_ends_a_process_that_cannot_run_handlers(work):
    assert send(start_python("end_on_signals()\n" + work), TERM) == (-TERM, "")


def test_second_interrupt_ends_a_process_that_cannot_run_handlers():
    code = "import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\nend_on_signals()\n"
    assert send(start_python(code + HELD), INT, INT) == (-INT, "")


def test_second_interrupt_ends_a_process_that_is_closing():
    code = f"end_on_signals()\ntry:\n    exec({FREE!r})\nfinally:\n    time.sleep(300)\n"
    assert send(start_python(code), INT, INT) == (-INT, "")


def test_first_interrupt_is_raised():
    code = f"end_on_signals()\ntry:\n    exec({FREE!r})\nexcept KeyboardInterrupt:\n    exit(5)\n"
    assert send(start_python(code), INT) == (5, "")


def test_ignored_interrupts_stay_ignored():
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nend_on_signals()\n"
    process = start_python(code + "print('ready', flush=True)\ninput()\n", stdin=subprocess.PIPE)
    process.send_signal(INT)
    process.send_signal(INT)
    process.communicate(b"\n", timeout=SECONDS)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("work", "status"), [(FREE, 143), (HELD, -signal.SIGALRM)], ids=["free", "held"]
)
def test_process_ends_within_its_time(work, status):
    process = start_python("end_within(0.2, 143)\n" + work)
    process.communicate(timeout=SECONDS)
    assert process.returncode == status


def test_process_may_end_before_its_time_is_over():
    process = start_python("end_within(100, 143)\nprint('ready')")
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0


def test_exit_functions_run_before_an_exit_at_once():
    code = "import atexit\natexit.register(print, 'closed')\nprint('ready')\nexit_at_once(7)"
    process = start_python(code)
    # Not `communicate`: it leaves out what was buffered with the first line.
    assert (process.stdout.read(), process.stderr.read()) == (b"closed\n", b"")
    process.wait(SECONDS)
    assert process.returncode == 7


def test_interrupt_ends_a_process_that_exits():
    code = f"close_at_exit(lambda: exec({FREE!r}))"
    assert send(start_python(code), INT) == (-INT, "")


# The commands.


@pytest.fixture
def environment(tmp_path):
    return os.environ | {
        "LLM_USER_PATH": str(tmp_path / "llm"),
        "FLASHMOE_CACHE": str(tmp_path / "states"),
    }


#: Commands that take long: all tokens are equally likely, so no answer ends early.
LONG = {
    "run": ("flashmoe", "run", DEMO, "Hello " * 1500, "--temperature", "5"),
    "llm": ("llm", "-m", DEMO, "Hello " * 1500, "-o", "temperature", "5"),
    "async": ("llm", "--async", "-m", DEMO, "Hello " * 1500, "-o", "temperature", "5"),
    "chat": ("llm", "chat", "-m", DEMO, "-o", "temperature", "5", "-o", "top_k", "0"),
    "serve": ("flashmoe", "serve", DEMO, "--port", "0"),
    "doctor": ("flashmoe", "doctor"),
}
STORY = b"Tell me a very long story.\n"


def start_command(name, environment):
    program, *words = LONG[name]
    process = start(SCRIPTS / program, *words, env=environment, stdin=subprocess.PIPE)
    if name == "chat":
        process.stdin.write(STORY)
        process.stdin.flush()
    return process


def test_second_interrupt_ends_a_chat_in_the_middle_of_an_answer(environment):
    process = start_command("chat", environment)
    shown = b""
    while not shown.partition(b"\n> ")[2].strip():  # the first words of the answer
        shown += (piece := os.read(process.stdout.fileno(), 1000))
        assert piece, (shown, process.stderr.read())
    process.send_signal(INT)
    time.sleep(0.002)
    # The answer may have ended by now, and then so does the chat, as after the end of its input.
    assert send(process, INT) in ((-INT, ""), (1, "\nAborted!\n"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_signals_at_any_moment_end_a_command(environment, name):
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    process = start_command(name, environment)
    time.sleep(chance.uniform(0.5, 12))
    signals = chance.choice([(TERM,), (INT, INT)])
    if process.poll() is not None:
        assert process.communicate()[1] == b""
        return
    status, errors = send(process, *signals)
    expected = {-number for number in signals} | {128 + number for number in signals} | {0}
    # 1: the first Ctrl-C, at which click says "Aborted!"
    assert status in expected | {1}, (seed, status, errors)
    assert "terminate called" not in errors, (seed, errors)
