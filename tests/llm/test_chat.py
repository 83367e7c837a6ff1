"""Test `llm chat` on a pseudo-terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from flashmoe.catalog import DEMO

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

LLM = str(Path(sys.executable).parent / "llm")


@pytest.fixture
def environment(tmp_path):
    own = {"LLM_USER_PATH": str(tmp_path), "FLASHMOE_CACHE": str(tmp_path / "states")}
    return os.environ | own | {"TERM": "dumb"}


@pytest.fixture
def open_chat(environment):
    chats = []

    def start(*args) -> pexpect.spawn:
        command = ["chat", *args]
        chats.append(pexpect.spawn(LLM, command, env=environment, encoding="utf8", timeout=300))
        chats[-1].expect("to finish.*> ")
        return chats[-1]

    yield start
    for chat in chats:
        chat.close(force=True)


def leave(chat) -> None:
    chat.sendline("quit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def logged(environment) -> list[dict]:
    command = [LLM, "logs", "--json", "-n", "0"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True).stdout)


GREEDY = ("-m", DEMO, "-o", "temperature", "0", "-o", "max_tokens", "40")


def test_chat_remembers_across_turns_and_processes(open_chat, environment):
    """The chat remembers a message of several lines, also in the next process."""
    chat = open_chat(*GREEDY)
    chat.sendline("!multi")
    chat.sendline("My name is Emma.")
    chat.sendline("Please remember it.")
    chat.sendline("!end")
    chat.expect("\r\n[^>]*> $")
    chat.sendline("What is my name?")
    chat.expect("Emma")
    chat.expect("> ")
    leave(chat)
    chat = open_chat("-c", *GREEDY)
    chat.sendline("What is my name?")
    chat.expect("Emma")
    chat.expect("> ")
    leave(chat)
    entries = logged(environment)
    assert len({e["conversation_id"] for e in entries}) == 1
    cached = [json.loads(e["token_details"] or "{}").get("cached_tokens", 0) for e in entries]
    assert cached[0] == 0
    assert 0 < cached[1] < cached[2]


def test_interrupt_cancels_the_answer_and_the_chat_goes_on(open_chat, environment):
    chat = open_chat("-m", DEMO, "-o", "temperature", "0")
    # The demo repeats itself after this prompt until the context is full.
    chat.sendline("My name is Emma. Count from one to one hundred.")
    chat.expect("one hundred.\r\n")
    chat.expect(r"[A-Z][a-z]+ [^\x1b\r]{25}")
    chat.sendintr()
    chat.expect("> ")
    chat.sendline("What is my name?")
    chat.expect("Emma")
    chat.expect("> ")
    leave(chat)
    first, _ = logged(environment)
    assert first["response_json"]["finish_reason"] == "cancelled"
    assert len(first["response"]) >= 25


def test_chat_goes_on_after_an_error(open_chat):
    chat = open_chat(*GREEDY)
    chat.sendline("My name is Emma.")
    chat.expect("\r\n[^>]*> $")
    chat.sendline("!multi")
    for _ in range(60):
        chat.sendline("word " * 80)
    chat.sendline("!end")
    chat.expect(r"Error: the prompt has \d+ tokens, and the context of this model is 4096")
    chat.expect("> ")
    chat.sendline("What is my name?")
    chat.expect("Emma")
    chat.expect("> ")
    leave(chat)


def test_errors_are_shown_without_a_traceback(open_chat):
    chat = open_chat("-m", DEMO, "-o", "experts", "11")
    for _ in range(2):
        chat.sendline("Hello.")
        chat.expect("Error: experts=11 is out of range")
        chat.expect("> ")
        assert "Traceback" not in chat.before
    leave(chat)
    chat = open_chat("-m", "qwen3.5-397b-flash")
    chat.sendline("Hello.")
    chat.expect("Error: qwen3.5-397b-flash is not on this disk: it is about 224 GB")
    chat.expect("flashmoe download qwen3.5-397b-flash")
    chat.expect("> ")
    leave(chat)


def test_reasoning_is_shown_dimmed(open_chat):
    chat = open_chat(*GREEDY, "-o", "think", "1", "-o", "thinking_budget", "12")
    chat.sendline("Why is the sky blue?")
    chat.expect(re.escape("\x1b[2m") + "[A-Za-z]")
    chat.expect("> ")
    leave(chat)


def test_tool_runs_after_its_approval(environment):
    add = 'def add(a: int, b: int) -> int:\n    "Add two numbers."\n    return a + b'
    command = ["chat", *GREEDY, "--functions", add, "--ta"]
    chat = pexpect.spawn(LLM, command, env=environment, encoding="utf8", timeout=300)
    chat.expect("to finish.*> ")
    chat.sendline("What is 17 plus 25? Use the tool.")
    chat.expect(r"add\(.*17.*25.*\)")
    chat.expect("Approve tool call")
    chat.sendline("y")
    chat.expect("42")
    chat.expect("> ")
    leave(chat)
