"""Look up models by name: their directories, capabilities and identifying parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_type_hints

from langchain_core.language_models import LangSmithParams, ModelProfile

from flashmoe import __version__, catalog
from flashmoe.checkpoint.capabilities import capabilities, directory_fingerprint
from flashmoe.errors import FlashMoEError

from .errors import ModelNotFound
from .options import CallOptions, Options

# The options on which the answer depends; the others only affect how it is delivered.
_ANSWER_OPTIONS = tuple(n for n in Options.model_fields if n not in ("prompt_cache", "timeout"))


def find_checkpoint(name: str) -> Path:
    """Return the checkpoint directory of a model.

    Raises:
        ModelNotFound: the model is unknown or not on this disk; says how to get it.
    """
    try:
        return catalog.find(name)
    except FlashMoEError as e:
        raise ModelNotFound(str(e)) from e


def identifying_params(call: CallOptions) -> dict[str, Any]:
    """Return everything on which an answer depends, except its messages, tools and formats."""
    params = {"model": call.model, "stop": call.stop, "version": __version__}
    try:
        path = catalog.find(call.model).resolve()
        params |= {"path": str(path), "files": directory_fingerprint(path)}
    except (FlashMoEError, OSError):
        pass  # the error is raised when an answer is asked for
    return params | {name: getattr(call, name) for name in _ANSWER_OPTIONS}


def tracing_params(call: CallOptions) -> LangSmithParams:
    """Return the parameters of a call that LangSmith's traces show."""
    params = LangSmithParams(ls_provider="flashmoe", ls_model_name=call.model, ls_model_type="chat")
    if call.temperature is not None:
        params["ls_temperature"] = call.temperature
    if call.max_tokens is not None:
        params["ls_max_tokens"] = call.max_tokens
    if call.stop:
        params["ls_stop"] = call.stop
    return params


def model_profile(name: str) -> ModelProfile:
    """Return the capabilities of a model, as LangChain describes them.

    Raises:
        CheckpointError: the model is unknown or not on this disk.
    """
    able = capabilities(catalog.find(name))
    profile = ModelProfile(
        name=name,
        open_weights=True,
        max_input_tokens=able.context,
        max_output_tokens=able.context,
        text_inputs=True,
        text_outputs=True,
        image_inputs=False,
        image_url_inputs=False,
        pdf_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        image_outputs=False,
        audio_outputs=False,
        video_outputs=False,
        image_tool_message=False,
        pdf_tool_message=False,
        reasoning_output=able.reasoning,
        tool_calling=able.tools,
        tool_choice=able.tools,
        tool_call_streaming=able.tools,
        # As system messages or as text of the user, as the model's template has it.
        mid_conversation_system_messages=True,
        mid_conversation_tools=False,
        structured_output=True,
        attachment=False,
        temperature=True,
    )
    # langchain-core warns of fields that it does not know yet.
    known = get_type_hints(ModelProfile).keys()
    return cast("ModelProfile", {k: v for k, v in profile.items() if k in known})
