"""Parse messages into answers that a schema describes."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.json import parse_partial_json

from flashmoe.chat import json_schema as schemas

from .schemas import AnswerSchema


def with_raw_message(model: Runnable, parser: Runnable) -> Runnable:
    """Return the chain of a model and a parser that gives {"raw", "parsed", "parsing_error"}.

    An error of the parser becomes the "parsing_error"; an error of the model is raised.
    """
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")


class SchemaParser(BaseCumulativeTransformOutputParser):
    """Parses the answer of a message by its schema; while the answer streams, what there is of it.

    LangChain's own parsers complete JSON that is cut short, or return None for a call that cannot
    be parsed. This parser raises an error instead.

    Args:
        schema_: the schema of the answer; None for any JSON object.
        from_call: the answer is the arguments of a tool call, not the text.
    """

    schema_: AnswerSchema | None = None
    from_call: bool = False

    @property
    def _type(self) -> str:
        return "flashmoe_schema"

    def parse(self, text: str) -> Any:
        """Parse the text of an answer.

        Raises:
            OutputParserException: the answer is incomplete, or does not fit the schema.
        """
        return self.parse_result([ChatGeneration(message=AIMessage(text))])

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Parse the first message of a result.

        Args:
            result: the message of the model.
            partial: the message may be incomplete; the answer is then None or what there is of it.

        Raises:
            OutputParserException: the answer is incomplete, or does not fit the schema.
        """
        generation = result[0]
        # LangChain wraps messages in a ChatGeneration, and plain text in a Generation.
        message: BaseMessage = (
            generation.message
            if isinstance(generation, ChatGeneration)
            else AIMessage(generation.text)
        )
        incomplete = isinstance(message, AIMessageChunk) and message.chunk_position != "last"
        if partial and incomplete:
            try:
                value = self._partial_value(message)
                return None if value is None else self._build(value)
            except ValueError:
                return None
        try:
            return self._build(self._value(message))
        except (ValueError, RecursionError) as e:
            reason = message.response_metadata.get("finish_reason")
            ending = f" (finish_reason: {reason})" if reason else ""
            raise OutputParserException(
                f"there is no valid answer{ending}: {e}", llm_output=message.text
            ) from e

    def _build(self, value: Any) -> Any:
        return value if self.schema_ is None else self.schema_.build(value)

    def _partial_value(self, message: BaseMessage) -> Any:
        if self.from_call:
            calls = message.tool_calls if isinstance(message, AIMessage) else []
            return calls[0]["args"] if calls else None
        return parse_partial_json(message.text) if message.text.strip() else None

    def _value(self, message: BaseMessage) -> Any:
        if not self.from_call:
            return schemas.loads(message.text)
        broken: list[str | None] = []
        if isinstance(message, AIMessage):
            if message.tool_calls:
                return message.tool_calls[0]["args"]
            broken = [call["error"] or call["args"] for call in message.invalid_tool_calls]
        raise ValueError(
            "; ".join(map(str, broken)) or f"there is no tool call, but {message.text[:200]!r}"
        )
