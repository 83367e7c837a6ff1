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
    "presence_penalty": check_number,
    "frequency_penalty": check_number,
    "logit_bias": check_object,
    "logprobs": check_flag,
    "top_logprobs": check_integer,
    "n": check_integer,
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
    "reasoning": check_object,
    "chat_template_kwargs": check_object,
    # Variables of Qwen's templates, which some clients send beside the other fields.
    "enable_thinking": check_flag,
    "preserve_thinking": check_flag,
    # As vLLM calls it: whether a last message of the assistant is continued.
    "continue_final_message": check_flag,
    "add_generation_prompt": check_flag,
    "modalities": one_of(["text"], way_out="these models write text only"),
    "audio": one_of(way_out="these models write text only"),
    "web_search_options": one_of(way_out="there is no web search here; pass a tool that searches"),
    "functions": one_of([], way_out="use tools instead"),
    "function_call": one_of("auto", "none", way_out="use tools and tool_choice instead"),
    # These are settings of OpenAI's own service or of other servers, or hints: they do not affect
    # the answer.
    **dict.fromkeys(
        ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
        + ("prompt_cache_retention", "prediction", "verbosity", "moderation", "keep_alive")
        + ("cache_prompt", "id_slot", "num_keep", "timings_per_token", "return_progress")
        + ("include_reasoning", "usage", "provider"),
        ignored,
    ),
}
