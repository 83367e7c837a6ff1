"""Render a chat template to text. Runs in a helper process: see `flashmoe.bounded`."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import CheckpointError, SettingError

#: The longest prompt, in characters. A context of a million tokens has some 5 million; encoding
#: takes some hundred bytes of memory for each.
MAX_CHARACTERS = 10**7
_SHOWN = 300


def render(
    template: str,
    conversations: list[list[dict]],
    tools: list[dict] | None,
    variables: list[dict[str, Any]],
) -> list[str]:
    """Return the texts of conversations, as transformers renders them in its sandbox.

    Args:
        template: its source.
        tools: their complete definitions.
        variables: what else the template can use, for each conversation.

    Raises:
        CheckpointError: the template cannot be read, or refuses the messages.
        SettingError: it writes too much.
    """
    texts = []
    for messages, more in zip(conversations, variables, strict=True):
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                tools=tools,  # type: ignore[arg-type]  # a list of less than it takes
                chat_template=template,
                **more,
            )
        except MemoryError:
            raise
        except Exception as e:  # jinja2 and templates raise many types
            reason = str(e) or type(e).__name__
            reason = reason if len(reason) <= _SHOWN else reason[: _SHOWN - 3] + "..."
            raise CheckpointError(
                f"the checkpoint's chat template refuses the messages: {reason}"
            ) from e
        texts.append(rendered[0][0])
    if (count := sum(map(len, texts))) > MAX_CHARACTERS:
        raise SettingError(
            f"the checkpoint's chat template writes {count} characters, more than "
            f"{MAX_CHARACTERS}: shorten the messages, or download the template again"
        )
    return texts
