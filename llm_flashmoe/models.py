"""Run prompts of llm on flashmoe models, sync and async."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
from llm.parts import StreamEvent

import llm
from flashmoe import catalog
from flashmoe.errors import FlashMoEError
from flashmoe.shutdown import end_on_signals
from flashmoe.system_errors import explain
from flashmoe.terminal import ProgressLine

from .errors import UserError
from .messages import engine_messages, engine_tools, failure_event, find_schema
from .options import ENGINE_OPTIONS, REQUEST_OPTIONS, Options

if TYPE_CHECKING:  # Not at run time: every command of llm loads this module.
    from flashmoe.engine import Engine
    from flashmoe.events import End, Event, ToolCall
    from flashmoe.requests import Request


class _FlashMoEBase:
    """The common part of the sync and the async model."""

    can_stream = True
    supports_tools = True
    supports_schema = True
    Options = Options

    def __init__(self, model: catalog.Model):
        self.model_id = model.name
        self._model = model

    def __str__(self) -> str:
        name = f"flashmoe: {self.model_id}"
        published = self._model.published
        if self._model.path is None and published is not None:
            return f"{name} (not on this disk, {published.size})"
        return name

    def _prepare(
        self, prompt: llm.Prompt, conversation: llm.Conversation | llm.AsyncConversation | None
    ) -> tuple[Engine, Request]:
        """Return the engine and the request for a prompt.

        Raises:
            UserError: the prompt has content that these models do not take.
            FlashMoEError: the model is not on this disk.
        """
        from flashmoe.engine import shared
        from flashmoe.requests import Request

        if _in_command():
            end_on_signals()
        options = prompt.options
        assert isinstance(options, Options), "llm builds the options with the class of the model"
        schema = find_schema(prompt, conversation)
        request = Request(
            messages=engine_messages(prompt.messages),
            tools=engine_tools(prompt.tools),
            stop=tuple(options.stop or ()),
            cache=options.cache is not False,
            response_format={"type": "json_schema", "schema": schema} if schema else None,
            **{name: getattr(options, name) for name in REQUEST_OPTIONS},
        )
        settings = {name: getattr(options, name) for name in ENGINE_OPTIONS}
        if settings["experts"] is None:
            settings["experts"] = self._model.experts
        settings = {name: value for name, value in settings.items() if value is not None}
        return shared(catalog.find(self.model_id), **settings), request


class FlashMoE(_FlashMoEBase, llm.Model):
    """A model whose experts are read from the disk when the router picks them."""

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[StreamEvent]:
        """Yield the events of the answer.

        In `llm chat`, an error is printed and Ctrl-C ends the answer, and the chat goes on.

        Raises:
            UserError: the answer failed, outside of `llm chat`.
        """
        from flashmoe.events import Progress

        cancel = threading.Event()
        in_chat = _in_chat()
        line = ProgressLine()
        with _interrupt_sets(cancel) if in_chat else nullcontext():
            try:
                engine, request = self._prepare(prompt, conversation)
                translate = Translator(
                    response, engine, stream=stream, hide_reasoning=_hides_reasoning(prompt)
                )
                with engine.stream(request, cancel) as events, line:
                    for event in events:
                        if isinstance(event, Progress):
                            line.show(event)
                        else:
                            line.close()
                            yield from translate(event)
                translate.raise_bad_calls()
            except (FlashMoEError, UserError, OSError, RuntimeError) as e:
                text = _text(e)
                if text is None:
                    raise
                if not in_chat:
                    raise UserError(text) from e
                # `llm chat` does not handle errors: raising this one would end the chat.
                click.echo(f"Error: {text}", err=True)
                yield failure_event(text)


class AsyncFlashMoE(_FlashMoEBase, llm.AsyncModel):
    """The same model for asyncio; it shares the engine of the sync model."""

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of the answer.

        Raises:
            UserError: the answer failed.
        """
        try:
            engine, request = self._prepare(prompt, conversation)
            translate = Translator(
                response, engine, stream=stream, hide_reasoning=_hides_reasoning(prompt)
            )
            async for event in engine.astream(request):
                for translated in translate(event):
                    yield translated
            translate.raise_bad_calls()
        except (FlashMoEError, OSError, RuntimeError) as e:
            text = _text(e)
            if text is None:
                raise
            raise UserError(text) from e


class Translator:
    """Translates the engine's events to llm's, for one response.

    Args:
        response: receives tool calls, token usage and statistics.
        engine: the engine that answers.
        stream: False joins each block of text or reasoning to one event.
        hide_reasoning: leave out the reasoning.
    """

    def __init__(
        self,
        response: llm.Response | llm.AsyncResponse,
        engine: Engine,
        *,
        stream: bool,
        hide_reasoning: bool = False,
    ):
        self._hide_reasoning = hide_reasoning
        self._response = response
        self._engine = engine
        self._stream = stream
        self._block: StreamEvent | None = None
        self._bad_calls: list[str] = []

    def __call__(self, event: Event) -> Iterator[StreamEvent]:
        """Yield llm's events for an event of the engine."""
        from flashmoe.events import End, Reasoning, Text, ToolCall

        if isinstance(event, Reasoning) and self._hide_reasoning:
            return
        if isinstance(event, Text | Reasoning):
            kind = "text" if isinstance(event, Text) else "reasoning"
            if self._block is not None and self._block.type == kind:
                self._block.chunk += event.text
            else:
                yield from self._flush()
                self._block = StreamEvent(type=kind, chunk=event.text)
            if self._stream:
                yield from self._flush()
            return
        if isinstance(event, ToolCall):
            yield from self._flush()
            yield from self._tool_call(event)
        elif isinstance(event, End):
            yield from self._flush()
            log_statistics(self._response, event, self._engine.path)

    def raise_bad_calls(self) -> None:
        """Raise an error for tool calls that cannot be used, after all events were translated.

        Raises:
            UserError: names each of these calls, with what is wrong with it.
        """
        if self._bad_calls:
            raise UserError("; ".join(self._bad_calls))

    def _flush(self) -> Iterator[StreamEvent]:
        block, self._block = self._block, None
        if block is not None:
            yield block

    def _tool_call(self, call: ToolCall) -> Iterator[StreamEvent]:
        if call.arguments is None:
            self._bad_calls.append(
                f"the model's call of {call.name or 'a tool'} cannot be used: {call.error}"
            )
            return
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        for kind, chunk in (("tool_call_name", call.name), ("tool_call_args", arguments)):
            yield StreamEvent(type=kind, chunk=chunk, tool_call_id=call.id, tool_name=call.name)
        self._response.add_tool_call(
            llm.ToolCall(name=call.name, arguments=call.arguments, tool_call_id=call.id)
        )


def log_statistics(response: llm.Response | llm.AsyncResponse, end: End, path: Path) -> None:
    """Set the token usage, model name and statistics of an answer, which llm logs.

    Args:
        path: the directory of the checkpoint.
    """
    details = {
        "cached_tokens": end.cached_tokens,
        "reasoning_tokens": end.reasoning_tokens,
        "forced_tokens": end.forced_tokens,
    }
    response.set_usage(
        input=end.prompt_tokens,
        output=end.generated_tokens,
        details={name: count for name, count in details.items() if count} or None,
    )
    name = catalog.DEMO if path == catalog.find(catalog.DEMO) else path.name
    pruned = f"@K={end.experts}" if end.experts != end.trained_experts else ""
    response.set_resolved_model(f"{name}{pruned}")
    response.response_json = end.figures() | {"path": str(path)}


def _text(error: Exception) -> str | None:
    """Return the text of an error for the user; None if it may be a bug."""
    return str(error) if isinstance(error, FlashMoEError | UserError) else explain(error)


def _in_command() -> bool:
    """Return whether this process runs a command of `llm`, and not Python code that uses it."""
    context = click.get_current_context(silent=True)
    commands = sys.modules.get("llm.cli")
    return context is not None and context.find_root().command is getattr(commands, "cli", None)


def _hides_reasoning(prompt: llm.Prompt) -> bool:
    """Return whether the user wants no reasoning shown; older versions of llm do not say."""
    return bool(getattr(prompt, "hide_reasoning", False))


def _in_chat() -> bool:
    """Return whether this process runs `llm chat`."""
    context = click.get_current_context(silent=True)
    return context is not None and context.info_name == "chat"


@contextmanager
def _interrupt_sets(event: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set `event`; the second one ends the process at once.

    Does nothing outside the main thread, where signals cannot be handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    end_on_signals()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
