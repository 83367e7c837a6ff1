"""The known fields of a request for a chat completion, and the values that each accepts."""

from __future__ import annotations

from .field_checks import (
    Check,
    check_flag,
    check_integer,
    check_list,
    check_number,
    check_object,
    check_text,
    ignored,
    of_type,
    one_of,
)

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

#: The fields of a chat completion that are known, and the check of each value that is not null.
FIELDS: dict[str, Check] = {
    "temperature": check_number,
    "top_p": check_number,
    "min_p": check_number,
    "repetition_penalty": check_number,
    "seed": check_integer,
    "top_k": check_integer,
    "thinking_budget": check_integer,
    "experts": check_integer,
    "model": check_text,
    "messages": check_list,
    "stream": check_flag,
    "stream_options": check_object,
    "max_tokens": check_integer,
    "max_completion_tokens": check_integer,
    "stop": of_type((str, list), "text or a list of texts"),
    "tools": check_list,
    "tool_choice": of_type((str, dict), "auto, none, required, or an object that names a function"),
    "parallel_tool_calls": check_flag,
    "response_format": check_object,
    "reasoning_effort": one_of(*EFFORTS, way_out=f"use one of {', '.join(EFFORTS)}"),
    "think": check_flag,
    "chat_template_kwargs": check_object,
    "n": one_of(1, way_out="each request gets one answer; send it again for another"),
    "logprobs": one_of(False, way_out="leave it out"),
    "top_logprobs": one_of(0, way_out="leave it out"),
    "logit_bias": one_of({}, way_out="leave it out"),
    "presence_penalty": one_of(0, way_out="leave it out, or try repetition_penalty"),
    "frequency_penalty": one_of(0, way_out="leave it out, or try repetition_penalty"),
    "modalities": one_of(["text"], way_out="these models write text only"),
    "audio": one_of(way_out="these models write text only"),
    "web_search_options": one_of(way_out="there is no web search here; pass a tool that searches"),
    "functions": one_of([], way_out="use tools instead"),
    "function_call": one_of("auto", "none", way_out="use tools and tool_choice instead"),
    # These are settings of OpenAI's own service, or hints: they do not affect the answer.
    **dict.fromkeys(
        ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
        + ("prompt_cache_retention", "prediction", "verbosity", "moderation"),
        ignored,
    ),
}
