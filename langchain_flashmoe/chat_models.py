"""`ChatFlashMoE`: LangChain's chat model over the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils import from_env
from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator
from typing_extensions import Self

from flashmoe import __version__, catalog
from flashmoe.engine import Engine, release, shared
from flashmoe.errors import FlashMoEError
from flashmoe.requests import Request, check_request

from .chunks import Translator
from .errors import InvalidRequest, translated
from .messages import engine_messages
from .models import find, identity, profile, tracing_params
from .options import OF_REQUEST, Call, Options
from .schemas import Schema
from .structured import SchemaParser, with_raw
from .tools import engine_choice, engine_format, openai_tools, response_format

if TYPE_CHECKING:
    from flashmoe.chat.token_counter import Counter


class ChatFlashMoE(BaseChatModel, Options):
    """A Mixture-of-Experts model that is larger than memory, run here: its experts stay on disk.

    Setup:
        Install `llm-flashmoe`. A model is the bundled `flashmoe-demo`, a name registered with
        `flashmoe register DIR`, or the directory of an MLX checkpoint of `qwen3_5_moe`,
        `qwen3_next` or `qwen3_moe`. No server, no key, no network.

    Key init args:
        model: a name or directory; else the environment's FLASHMOE_MODEL.
        memory: peak memory of the process, such as "8GB".
        experts: K, to prune the router: faster, not exact.
        temperature, max_tokens, seed, reasoning, ...: see the fields.

        Nothing is loaded before the first call. Models of the same checkpoint, `memory`, `io` and
        `activations` share one engine, which takes requests through the model together; `close`
        frees it.
        Arguments that are not known are refused.

    Instantiate:
        from langchain_flashmoe import ChatFlashMoE
        model = ChatFlashMoE(model="flashmoe-demo", temperature=0)

    Invoke:
        model.invoke("Hello!").content

    Stream:
        for chunk in model.stream("Hello!"):
            print(chunk.text, end="")

    Async:
        await model.ainvoke("Hello!")       # cancelling the task stops the model

    Tool calling:
        bound = model.bind_tools([get_weather], tool_choice="any")
        bound.invoke("What is the weather in Paris?").tool_calls

    Structured output:
        model.with_structured_output(Person).invoke("Anna is 31.")   # a Person, by grammar

    Token usage:
        message.usage_metadata              # with cache_read and reasoning details

    Response metadata:
        message.response_metadata           # finish_reason, tokens_per_second, hit_rate, experts...

    Errors are LangChain's own (`langchain_core.exceptions`) and flashmoe's at once; see
    `langchain_flashmoe.errors`.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str = Field(
        default_factory=from_env(
            "FLASHMOE_MODEL",
            error_message="no model is given: pass model='flashmoe-demo', another name or the "
            "directory of a checkpoint, or set FLASHMOE_MODEL",
        )
    )
    """A name, an alias, or the directory of a checkpoint."""

    stop: list[str] | None = None
    """The answer ends before the first of these, or of those that a call adds."""

    memory: str | int | None = None
    """Peak memory of the process, such as "8GB". `None`: what the machine can spare."""

    io: str | None = None
    """How experts are read: "buffered", "uncached" or "direct". `None`: as `flashmoe bench disk` found, or direct."""

    activations: str | None = None
    """"float32", or "int8" on a CPU: faster, not exact; see `flashmoe.ops.activations`."""

    streaming: bool = False
    """Stream inside `invoke`, so that callbacks see each token as a chunk of a stream."""

    max_retries: int | None = None
    """Accepted for code that passes it to every model: nothing here fails on the way."""

    api_key: SecretStr | None = Field(default=None, exclude=True)
    """The same: there is nobody to show a key to."""

    @field_validator("stop", mode="before")
    @classmethod
    def _text_or_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _note_version(self) -> Self:
        self._add_version("langchain-flashmoe", __version__)
        return self

    # What it is.

    @property
    def _llm_type(self) -> str:
        return "flashmoe-chat"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return identity(Call.of(self, None, {}))

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of LangChain's cache. Its own has neither the files of the model nor, when a call
        has some, the stop strings of the constructor."""
        own = identity(Call.of(self, stop, kwargs))
        return str(sorted((kwargs | own | {"_type": self._llm_type}).items()))

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return tracing_params(Call.of(self, stop, kwargs))

    def _resolve_model_profile(self) -> ModelProfile | None:
        return profile(self.model)

    # Counting.

    def get_token_ids(self, text: str) -> list[int]:
        """The tokens of a text that stands in a message."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._counter().tokens(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Tokens of messages and tools through the model's chat template: for a conversation that
        can be answered, those of `usage_metadata["input_tokens"]`."""
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages)
        counted = engine_messages(messages), openai_tools(tools or [])
        try:
            return self._counter().count(*counted, think=self.reasoning)
        except FlashMoEError as e:
            raise translated(e) from e

    def _counter(self) -> Counter:
        from flashmoe.chat.token_counter import counter

        try:
            return counter(find(self.model))
        except FlashMoEError as e:
            raise translated(e) from e

    # Answers.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = Call.of(self, stop, kwargs)
        translate = Translator(call.model)
        for chunk in self._chunks(call, messages, translate):
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        return ChatResult(generations=[ChatGeneration(message=translate.message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = Call.of(self, stop, kwargs)
        translate = Translator(call.model)
        async with aclosing(self._achunks(call, messages, translate)) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        return ChatResult(generations=[ChatGeneration(message=translate.message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = Call.of(self, stop, kwargs)
        for chunk in self._chunks(call, messages, Translator(call.model)):
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = Call.of(self, stop, kwargs)
        async with aclosing(self._achunks(call, messages, Translator(call.model))) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _chunks(
        self, call: Call, messages: list[BaseMessage], translate: Translator
    ) -> Iterator[ChatGenerationChunk]:
        engine, request = self._request(call, messages)
        try:
            # Leaving the block, also when this generator is closed, cancels the answer.
            with engine.stream(request, timeout=call.timeout) as events:
                for event in events:
                    if (chunk := translate(event)) is not None:
                        yield chunk
        except FlashMoEError as e:
            yield translate.ending(e, keep=call.on_incomplete == "return")

    async def _achunks(
        self, call: Call, messages: list[BaseMessage], translate: Translator
    ) -> AsyncIterator[ChatGenerationChunk]:
        engine, request = self._request(call, messages)
        try:
            async with aclosing(engine.astream(request, timeout=call.timeout)) as events:
                async for event in events:
                    if (chunk := translate(event)) is not None:
                        yield chunk
        except FlashMoEError as e:
            yield translate.ending(e, keep=call.on_incomplete == "return")

    def _request(self, call: Call, messages: list[BaseMessage]) -> tuple[Engine, Request]:
        """
        Raises:
            InvalidRequest, ModelNotFound
        """
        path = find(call.model)
        tools = openai_tools(call.tools)
        # K belongs to the request, so that models that differ by it alone share one engine.
        experts = catalog.model(call.model).experts if call.experts is None else call.experts
        request = Request(
            messages=engine_messages(messages),
            tools=tools,
            tool_choice=engine_choice(call.tool_choice, tools),
            parallel_tool_calls=call.parallel_tool_calls is not False,
            response_format=engine_format(call.response_format),
            stop=tuple(call.stop),
            experts=experts,
            think=call.reasoning,
            cache=call.prompt_cache,
            **{name: getattr(call, name) for name in OF_REQUEST},
        )
        try:
            check_request(request)
        except FlashMoEError as e:
            raise translated(e) from e
        settings = {"memory": self.memory, "io": self.io, "activations": self.activations}
        settings = {name: value for name, value in settings.items() if value is not None}
        return shared(path, **settings), request

    # What can be bound.

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict | str | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools. A grammar holds calls to their schemas.

        Args:
            tools: LangChain's tools, functions, pydantic classes, TypedDicts, or definitions as
                dicts of OpenAI or Anthropic.
            tool_choice: None or "auto": the model decides. "any", "required" or True: one call or
                more. The name of a tool, or a dict with it as of OpenAI or Anthropic: one call of
                it. "none" or False: no call.
            strict: True: objects take no other properties. Schemas are enforced in any case.
            kwargs: more options of calls, such as `parallel_tool_calls`, `response_format` (the
                answer is then calls or such a document) or `temperature`.

        Raises:
            InvalidRequest: a tool, a choice or an option that cannot be.
        """
        formatted = openai_tools(tools, strict)
        engine_choice(tool_choice, formatted)
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self._bound(tools=formatted, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with answers that a schema describes. A grammar holds it to the schema.

        Args:
            schema: a pydantic class (1 or 2: answers are objects of it), a TypedDict, a JSON schema
                or a function as OpenAI describes it (answers are dicts). None, with "json_mode":
                any JSON object.
            method: "json_schema": the answer is JSON. "function_calling": it is the arguments of a
                call, so that the model sees the schema with its descriptions, as a tool.
                "json_mode": as "json_schema".
            include_raw: answers are {"raw": message, "parsed": answer or None, "parsing_error":
                exception or None}.
            strict: as of `bind_tools`.
            kwargs: more options of calls, such as `max_tokens`.

        Raises:
            InvalidRequest: at once, for arguments that cannot be.

        An answer that is cut short raises `IncompleteOutput`; with include_raw it is the raw one.
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise InvalidRequest(
                f"method={method!r} is not json_schema, function_calling or json_mode"
            )
        if schema is None and method != "json_mode":
            raise InvalidRequest(f"method={method!r} needs a schema")
        described = None if schema is None else Schema.of(schema)
        kwargs["ls_structured_output_format"] = {
            "kwargs": {"method": method, "strict": strict},
            "schema": schema,
        }
        if include_raw:
            kwargs.setdefault("on_incomplete", "return")
        if method == "function_calling":
            kwargs |= {"tool_choice": described.name, "parallel_tool_calls": False}
            model = self.bind_tools([described.tool], strict=strict, **kwargs)
        else:
            model = self._bound(response_format=response_format(described), **kwargs)
        parser = SchemaParser(schema_=described, from_call=method == "function_calling")
        return with_raw(model, parser) if include_raw else model | parser

    def _bound(self, **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        ours = {k: v for k, v in kwargs.items() if k != "ls_structured_output_format"}
        Call.of(self, ours.get("stop"), ours)
        return self.bind(**kwargs)

    # Its end.

    def close(self) -> None:
        """Free the memory of the checkpoint: of this model, and of all that share it. It is loaded
        again by the next call."""
        release(find(self.model))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
