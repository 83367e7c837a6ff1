"""Define `ChatFlashMoE`, LangChain's chat model on the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils import from_env
from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

from flashmoe import __version__, catalog
from flashmoe.engine import Engine, release, shared
from flashmoe.errors import FlashMoEError
from flashmoe.requests import Request, check_request

from .chunks import Translator
from .errors import InvalidRequest, to_langchain_error
from .messages import engine_messages
from .models import find_checkpoint, identifying_params, model_profile, tracing_params
from .options import REQUEST_OPTIONS, CallOptions, Options
from .schemas import AnswerSchema
from .structured import SchemaParser, with_raw_message
from .tools import engine_response_format, engine_tool_choice, openai_response_format, openai_tools

if TYPE_CHECKING:
    from flashmoe.chat.token_counter import TokenCounter


class ChatFlashMoE(BaseChatModel, Options):
    """Runs a Mixture-of-Experts model that is larger than memory: its experts stay on the disk.

    Setup:
        Install `llm-flashmoe`. A model is the bundled `flashmoe-demo`, a name registered with
        `flashmoe register DIR`, or the directory of an MLX checkpoint of `qwen3_5_moe`,
        `qwen3_next` or `qwen3_moe`. It needs no server, no key and no network.

    Key init args:
        model: a name or directory. Default: the environment variable FLASHMOE_MODEL.
        memory: peak memory of the process, such as "8GB".
        experts: use only the top K experts of the router: faster, but not exact.
        temperature, max_tokens, seed, reasoning, ...: see the fields.

        Nothing is loaded before the first call. Models with the same checkpoint, `memory`, `io` and
        `activations` share one engine, which processes their requests together; `close` frees it.
        Unknown arguments are refused.

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

    Every error is both LangChain's (`langchain_core.exceptions`) and flashmoe's; see
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
    """Stop strings: the answer ends before the first of them, or of those that a call adds."""

    memory: str | int | None = None
    """Peak memory of the process, such as "8GB". `None`: what the machine can spare."""

    context: int | None = None
    """Tokens of prompt and answer that memory is kept for; on a GPU longer ones are refused if they
    do not fit. `None`: what is usual, or what fits."""

    io: str | None = None
    """How experts are read: "buffered", "uncached" or "direct"; see `flashmoe.streaming.io_modes`.
    `None`: the fastest in `flashmoe bench disk`, or direct."""

    activations: str | None = None
    """"float32", or "int8": faster on a CPU, but not exact; see `flashmoe.ops.activations`."""

    streaming: bool = False
    """Stream inside `invoke`, so that callbacks get each token as a chunk."""

    max_retries: int | None = None
    """Has no effect, since there is no network that can fail; accepted because other models take
    it."""

    api_key: SecretStr | None = Field(default=None, exclude=True)
    """Has no effect, since there is no server; accepted because other models take it."""

    @field_validator("stop", mode="before")
    @classmethod
    def _text_or_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _note_version(self) -> Self:
        self._add_version("langchain-flashmoe", __version__)
        return self

    # Identity.

    @property
    def _llm_type(self) -> str:
        return "flashmoe-chat"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return identifying_params(CallOptions.merge(self, None, {}))

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return the key of LangChain's cache of answers.

        LangChain's own key lacks the files of the model, and the stop strings of the constructor if
        the call has stop strings too.
        """
        own = identifying_params(CallOptions.merge(self, stop, kwargs))
        return str(sorted((kwargs | own | {"_type": self._llm_type}).items()))

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return tracing_params(CallOptions.merge(self, stop, kwargs))

    def _resolve_model_profile(self) -> ModelProfile | None:
        return model_profile(self.model)

    # Token counts.

    def get_token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text as it is encoded in a message."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._counter().encode(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return the number of tokens of messages and tools, with the model's chat template.

        For a conversation that can be answered, it equals `usage_metadata["input_tokens"]`.

        Raises:
            InvalidRequest: a message or tool cannot be used.
            ModelNotFound: the model is unknown or not on this disk.
        """
        if self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages)
        converted = engine_messages(messages), openai_tools(tools or [])
        try:
            variables = dict(self.chat_template_kwargs or {})
            switch = variables.pop("enable_thinking", None)
            think = switch if self.reasoning is None else self.reasoning
            return self._counter().count(*converted, think=think, variables=variables)
        except FlashMoEError as e:
            raise to_langchain_error(e) from e

    def _counter(self) -> TokenCounter:
        from flashmoe.chat.token_counter import token_counter

        try:
            return token_counter(find_checkpoint(self.model))
        except FlashMoEError as e:
            raise to_langchain_error(e) from e

    # Generation.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = CallOptions.merge(self, stop, kwargs)
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
        call = CallOptions.merge(self, stop, kwargs)
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
        call = CallOptions.merge(self, stop, kwargs)
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
        call = CallOptions.merge(self, stop, kwargs)
        async with aclosing(self._achunks(call, messages, Translator(call.model))) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _chunks(
        self, call: CallOptions, messages: list[BaseMessage], translate: Translator
    ) -> Iterator[ChatGenerationChunk]:
        engine, request = self._request(call, messages)
        try:
            # Leaving this block cancels the answer, also when this generator is closed.
            with engine.stream(request, timeout=call.timeout) as events:
                for event in events:
                    if (chunk := translate(event)) is not None:
                        yield chunk
        except FlashMoEError as e:
            yield translate.finish_failed(e, keep=call.on_incomplete == "return")

    async def _achunks(
        self, call: CallOptions, messages: list[BaseMessage], translate: Translator
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        engine, request = self._request(call, messages)
        try:
            async with aclosing(engine.astream(request, timeout=call.timeout)) as events:
                async for event in events:
                    if (chunk := translate(event)) is not None:
                        yield chunk
        except FlashMoEError as e:
            yield translate.finish_failed(e, keep=call.on_incomplete == "return")

    def _request(self, call: CallOptions, messages: list[BaseMessage]) -> tuple[Engine, Request]:
        """Return the engine and the request for a call.

        Raises:
            InvalidRequest: a message, a tool or an option cannot be used.
            ModelNotFound: the model is unknown or not on this disk.
        """
        path = find_checkpoint(call.model)
        tools = openai_tools(call.tools)
        # K is set in the request, so that models that differ only in K share one engine.
        experts = catalog.model(call.model).experts if call.experts is None else call.experts
        request = Request(
            messages=engine_messages(messages),
            tools=tools,
            tool_choice=engine_tool_choice(call.tool_choice, tools),
            parallel_tool_calls=call.parallel_tool_calls is not False,
            response_format=engine_response_format(call.response_format),
            stop=tuple(call.stop),
            experts=experts,
            think=call.reasoning,
            cache=call.prompt_cache,
            logprobs=call.reported_logprobs,
            **{name: getattr(call, name) for name in REQUEST_OPTIONS},
        )
        settings: dict[str, Any] = {
            "memory": self.memory,
            "context": self.context,
            "io": self.io,
            "activations": self.activations,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        try:
            check_request(request)
            return shared(path, **settings), request
        except FlashMoEError as e:
            raise to_langchain_error(e) from e

    # Bound models.

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict | str | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with tools, whose calls a grammar keeps to the schemas.

        Args:
            tools: LangChain's tools, functions, pydantic classes, TypedDicts, or definitions of
                OpenAI or Anthropic as dicts.
            tool_choice: None or "auto": the model decides. "any", "required" or True: at least one
                call. The name of a tool, or a dict of OpenAI or Anthropic with it: exactly one call
                of this tool. "none" or False: no call.
            strict: True adds to the schemas that objects take no other properties. Schemas are
                enforced in any case.
            kwargs: more options of calls, such as `parallel_tool_calls`, `temperature`, or
                `response_format`, with which the answer is either calls or text in this format.

        Raises:
            InvalidRequest: a tool, the choice or an option cannot be used.
        """
        formatted = openai_tools(tools, strict)
        engine_tool_choice(tool_choice, formatted)
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self._bind_options(tools=formatted, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the model with structured answers, which a grammar keeps to the schema.

        Args:
            schema: a class of pydantic 1 or 2, of which answers become objects; or a TypedDict, a
                JSON schema or a function definition of OpenAI, for which answers are dicts. With
                "json_mode" it may be None, which allows any JSON object.
            method: "json_schema": the answer is JSON. "function_calling": the answer is the
                arguments of a tool call, so that the model sees the schema with its descriptions,
                as a tool. "json_mode": the same as "json_schema".
            include_raw: return {"raw": message, "parsed": answer or None, "parsing_error":
                exception or None}.
            strict: as in `bind_tools`.
            kwargs: more options of calls, such as `max_tokens`.

        Raises:
            InvalidRequest: an argument cannot be used.

        An answer that is cut short raises `IncompleteOutput` when it is generated; with include_raw
        it is returned as "raw".
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise InvalidRequest(
                f"method={method!r} is not supported: use json_schema, function_calling or "
                "json_mode"
            )
        if schema is None and method != "json_mode":
            raise InvalidRequest(
                f"method={method!r} needs a schema: pass one, or use method='json_mode' for any "
                "JSON object"
            )
        answer_schema = None if schema is None else AnswerSchema.from_any(schema)
        kwargs["ls_structured_output_format"] = {
            "kwargs": {"method": method, "strict": strict},
            "schema": schema,
        }
        if include_raw:
            kwargs.setdefault("on_incomplete", "return")
        if method == "function_calling":
            assert answer_schema is not None, "only json_mode takes None"
            kwargs |= {"tool_choice": answer_schema.name, "parallel_tool_calls": False}
            model = self.bind_tools([answer_schema.tool], strict=strict, **kwargs)
        else:
            model = self._bind_options(
                response_format=openai_response_format(answer_schema), **kwargs
            )
        parser = SchemaParser(schema_=answer_schema, from_call=method == "function_calling")
        return with_raw_message(model, parser) if include_raw else model | parser

    def _bind_options(self, **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with options of calls, which are checked at once."""
        ours = {k: v for k, v in kwargs.items() if k != "ls_structured_output_format"}
        CallOptions.merge(self, ours.get("stop"), ours)
        return self.bind(**kwargs)

    # Memory.

    def close(self) -> None:
        """Free the memory of the checkpoint, also for all other models that share it.

        The next call loads it again.
        """
        release(find_checkpoint(self.model))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
