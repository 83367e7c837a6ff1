"""The models that llm runs, sync and async: prompts to requests, events to llm's."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext

import click
from llm.parts import StreamEvent

import llm
from flashmoe import catalog
from flashmoe.errors import FlashMoEError
from flashmoe.terminal import ProgressLine

from .errors import UserError
from .messages import engine_messages, engine_tools, failure, schema_of
from .options import OF_ENGINE, OF_REQUEST, Options


class _Base:
    """What the sync and the async model share."""

    can_stream = True
    supports_tools = True
    supports_schema = True
    Options = Options

    def __init__(self, model: catalog.Model):
        self.model_id = model.name
        self._model = model

    def __str__(self) -> str:
        name = f"flashmoe: {self.model_id}"
        if self._model.path is None:
            return f"{name} (not on this disk, {self._model.published.nbytes / 1e9:.0f} GB)"
        return name

    def _start(self, prompt, conversation):
        """(engine, request) for a prompt.

        Raises:
            UserError, FlashMoEError
        """
        from flashmoe.engine import shared
        from flashmoe.requests import Request

        options = prompt.options
        schema = schema_of(prompt, conversation)
        request = Request(
            messages=engine_messages(prompt.messages),
            tools=engine_tools(prompt.tools),
            stop=tuple(options.stop or ()),
            cache=options.cache is not False,
            response_format={"type": "json_schema", "schema": schema} if schema else None,
            **{name: getattr(options, name) for name in OF_REQUEST},
        )
        settings = {name: getattr(options, name) for name in OF_ENGINE}
        if settings["experts"] is None:
            settings["experts"] = self._model.experts
        settings = {name: value for name, value in settings.items() if value is not None}
        return shared(catalog.find(self.model_id), **settings), request


class FlashMoE(_Base, llm.Model):
    """A checkpoint whose experts are read from disk as the router picks them."""

    def execute(self, prompt, stream, response, conversation) -> Iterator[StreamEvent]:
        from flashmoe.events import Progress

        cancel = threading.Event()
        in_chat = _in_chat()
        line = ProgressLine()
        with _interrupt_sets(cancel) if in_chat else nullcontext():
            try:
                engine, request = self._start(prompt, conversation)
                translate = Translator(response, engine, stream=stream)
                with engine.stream(request, cancel) as events, line:
                    for event in events:
                        if isinstance(event, Progress):
                            line.show(event)
                        else:
                            line.close()
                            yield from translate(event)
                translate.check()
            except (FlashMoEError, UserError) as e:
                if not in_chat:
                    raise UserError(str(e)) from e
                # `llm chat` handles no errors: raised, it would end the chat.
                click.echo(f"Error: {e}", err=True)
                yield failure(str(e))


class AsyncFlashMoE(_Base, llm.AsyncModel):
    """The same for asyncio, with the same engine."""

    async def execute(self, prompt, stream, response, conversation) -> AsyncIterator[StreamEvent]:
        try:
            engine, request = self._start(prompt, conversation)
            translate = Translator(response, engine, stream=stream)
            async for event in engine.astream(request):
                for translated in translate(event):
                    yield translated
            translate.check()
        except FlashMoEError as e:
            raise UserError(str(e)) from e


class Translator:
    """Events of the engine to events of llm, for one response.

    Args:
        stream: False: text comes in one event for each block.
    """

    def __init__(self, response: llm.Response, engine, *, stream: bool):
        self._response = response
        self._engine = engine
        self._stream = stream
        self._block: StreamEvent | None = None
        self._bad_calls: list[str] = []

    def __call__(self, event) -> Iterator[StreamEvent]:
        from flashmoe.events import End, Reasoning, Text, ToolCall

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
            yield from self._call(event)
        elif isinstance(event, End):
            yield from self._flush()
            report(self._response, event, self._engine.path)

    def check(self) -> None:
        """Raise for calls that cannot be made, when all else has been said."""
        if self._bad_calls:
            raise UserError("; ".join(self._bad_calls))

    def _flush(self) -> Iterator[StreamEvent]:
        block, self._block = self._block, None
        if block is not None:
            yield block

    def _call(self, call) -> Iterator[StreamEvent]:
        if call.error is not None:
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


def report(response, end, path) -> None:
    """Put the figures of an answer where llm logs them."""
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


def _in_chat() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and context.info_name == "chat"


@contextmanager
def _interrupt_sets(event: threading.Event):
    """The first Ctrl-C sets `event`, the second one raises as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, frame):
        signal.signal(signal.SIGINT, before)
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
