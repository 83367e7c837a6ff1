"""Messages to the answers that a schema describes."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.json import parse_partial_json

from flashmoe.chat import json_schema as schemas

from .schemas import Schema


def with_raw(model: Runnable, parser: Runnable) -> Runnable:
    """The chain of both whose answers are {"raw", "parsed", "parsing_error"}. Errors of the parser
    are the latter; errors of the model are raised."""
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")


class SchemaParser(BaseCumulativeTransformOutputParser):
    """The answer of a message, by its schema. While it streams, what there is of it.

    Where LangChain's own parsers mend JSON that is cut short, or give None for a call that cannot
    be read, this one raises.

    Args:
        schema_: None: any JSON object.
        from_call: the answer is the arguments of a call, not the text.
    """

    schema_: Schema | None = None
    from_call: bool = False

    @property
    def _type(self) -> str:
        return "flashmoe_schema"

    def parse(self, text: str) -> Any:
        return self.parse_result([ChatGeneration(message=AIMessage(text))])

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """
        Raises:
            OutputParserException: the answer is not whole, or does not fit.
        """
        message = result[0].message
        under_way = isinstance(message, AIMessageChunk) and message.chunk_position != "last"
        if partial and under_way:
            try:
                value = self._partial(message)
                return None if value is None else self._made(value)
            except ValueError:
                return None
        try:
            return self._made(self._value(message))
        except (ValueError, RecursionError) as e:
            reason = message.response_metadata.get("finish_reason")
            ending = f" (finish_reason: {reason})" if reason else ""
            raise OutputParserException(
                f"there is no valid answer{ending}: {e}", llm_output=message.text
            ) from e

    def _made(self, value: Any) -> Any:
        return value if self.schema_ is None else self.schema_.make(value)

    def _partial(self, message: AIMessage) -> Any:
        if self.from_call:
            return message.tool_calls[0]["args"] if message.tool_calls else None
        return parse_partial_json(message.text) if message.text.strip() else None

    def _value(self, message: AIMessage) -> Any:
        if not self.from_call:
            return schemas.loads(message.text)
        if message.tool_calls:
            return message.tool_calls[0]["args"]
        broken = [call["error"] or call["args"] for call in message.invalid_tool_calls]
        raise ValueError("; ".join(map(str, broken)) or f"no call, but {message.text[:200]!r}")
