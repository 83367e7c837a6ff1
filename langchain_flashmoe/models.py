"""What names of models stand for: where they are, what they can do, what answers depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.language_models import LangSmithParams, ModelProfile

from flashmoe import __version__, catalog
from flashmoe.checkpoint.capabilities import capabilities, fingerprint
from flashmoe.errors import FlashMoEError

from .errors import ModelNotFound
from .options import Call, Options

# Options that decide what an answer is; the others decide how it comes.
_OF_THE_ANSWER = tuple(n for n in Options.model_fields if n not in ("prompt_cache", "timeout"))


def find(name: str) -> Path:
    """The checkpoint directory of a model.

    Raises:
        ModelNotFound: says how to get it.
    """
    try:
        return catalog.find(name)
    except FlashMoEError as e:
        raise ModelNotFound(str(e)) from e


def identity(call: Call) -> dict[str, Any]:
    """All that an answer depends on, but for its messages, tools and formats."""
    found = {"model": call.model, "stop": call.stop, "version": __version__}
    try:
        path = catalog.find(call.model).resolve()
        found |= {"path": str(path), "files": fingerprint(path)}
    except (FlashMoEError, OSError):
        pass  # said when it is asked for an answer
    return found | {name: getattr(call, name) for name in _OF_THE_ANSWER}


def tracing_params(call: Call) -> LangSmithParams:
    """What traces show of a call."""
    params = LangSmithParams(ls_provider="flashmoe", ls_model_name=call.model, ls_model_type="chat")
    if call.temperature is not None:
        params["ls_temperature"] = call.temperature
    if call.max_tokens is not None:
        params["ls_max_tokens"] = call.max_tokens
    if call.stop:
        params["ls_stop"] = call.stop
    return params


def profile(name: str) -> ModelProfile:
    """What a model takes and gives.

    Raises:
        CheckpointError: it is not there.
    """
    able = capabilities(catalog.find(name))
    inputs = ("image", "image_url", "pdf", "audio", "video")
    return ModelProfile(
        name=name,
        open_weights=True,
        max_input_tokens=able.context,
        text_inputs=True,
        text_outputs=True,
        **{f"{kind}_inputs": False for kind in inputs},
        **{f"{kind}_outputs": False for kind in ("image", "audio", "video")},
        image_tool_message=False,
        pdf_tool_message=False,
        reasoning_output=able.thoughts,
        tool_calling=able.tools,
        tool_choice=able.tools,
        tool_call_streaming=able.tools,
        structured_output=True,
    )
