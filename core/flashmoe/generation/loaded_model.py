"""Hold a loaded model and what it takes to answer requests with it, on the engine's thread."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..chat.output_parser import OutputParser
from ..chat.special_tokens import SpecialTokens
from ..chat.template import ChatTemplate
from ..chat.tools import check_tool_choice, read_tools
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import ContextError
from ..events import Event
from ..grammar.constraint import Constraint, MatcherFactory
from ..grammar.response import read_response_format
from ..memory.footprint import prompt_cache_nbytes
from ..models.loading import load_streaming
from ..options import EngineOptions
from ..requests import Request, in_range
from .answer import AnswerState
from .job import Cancellation
from .prompt import PromptPrefill, PromptReader
from .prompt_cache import PromptCache, PromptStore
from .sampling import Sampler
from .sequence import ActiveSequence

if TYPE_CHECKING:
    from ..cluster.lead import Cluster
    from ..models.qwen_moe import StreamingMoE

DEFAULT_MAX_TOKENS = 4096


class LoadedModel:
    """A model with its tokenizer, chat template and prompt cache.

    Args:
        path: the checkpoint directory.
        options: how to load it, and where prompt cache entries go.

    Raises:
        CheckpointError, BudgetError, SettingError, ClusterError: with the values and the way out.
    """

    def __init__(self, path: Path, options: EngineOptions | None = None):
        options = options or EngineOptions()
        self.checkpoint = Checkpoint.open(path)
        self.tokenizer = read_tokenizer(self.checkpoint)
        self._cluster, self.model = _load(self.checkpoint, options)
        self.special_tokens = SpecialTokens.from_tokenizer(self.tokenizer)
        self.template = ChatTemplate(self.tokenizer, self.special_tokens)
        self._defaults = sampling_defaults(self.checkpoint.path)
        width = self.checkpoint.text_config["vocab_size"]
        self._matchers = MatcherFactory(self.tokenizer, self.special_tokens, width)
        cached = options.prompt_cache_nbytes
        self.prompt_cache = PromptCache(
            prompt_cache_nbytes(self.checkpoint) if cached is None else cached
        )
        stored, directory = options.prompt_store_nbytes, options.prompt_store_path
        self.prompt_store = (
            PromptStore(None if directory is None else Path(directory), stored) if stored else None
        )
        self._reader = PromptReader(self.model, self.prompt_cache, self.prompt_store)

    def close(self) -> None:
        """Free the prompt cache, end the reader's threads, and end the workers of a cluster."""
        self.prompt_cache.clear()
        self.model.close()
        if self._cluster is not None:
            self._cluster.close()

    def rest(self) -> None:
        """Let the workers of a cluster sleep: there is nothing to do for a while."""
        if self._cluster is not None:
            self._cluster.rest()

    def prepare_answer(
        self,
        request: Request,
        emit: Callable[[Event], None],
        cancelled: Cancellation,
    ) -> AnswerState:
        """Check a request and build its prompt, before the model does any work.

        Args:
            emit: takes the events of the answer.
            cancelled: tells whether anybody still waits for the answer.

        Raises:
            SettingError: the request has an impossible value.
            ContextError: the prompt is longer than the context.
        """
        start = perf_counter()
        self.experts_per_token(request)
        tools = read_tools(request.tools)
        check_tool_choice(request.tool_choice, tools)
        wanted = request.response_format
        response_format = read_response_format(wanted) if wanted else None
        must_call = request.tool_choice not in ("auto", "none")
        prompt = self.template.build_prompt(
            request.messages,
            tools,
            think=request.think,
            structured=request.constrain and (response_format is not None or must_call),
        )
        newlines = self.template.encode("\n"), self.template.encode("\n\n")
        return AnswerState(
            request=request,
            prompt=prompt,
            response_format=response_format,
            max_tokens=self._max_tokens(request, prompt.tokens),
            constraint=Constraint(
                self._matchers,
                self.special_tokens,
                newlines,
                request,
                tools,
                response_format,
                prompt.in_reasoning,
            ),
            parser=OutputParser(
                self.tokenizer, self.special_tokens, tools, request.stop, prompt.in_reasoning
            ),
            emit=emit,
            cancelled=cancelled,
            started=start,
        )

    def start_sequence(self, answer: AnswerState) -> ActiveSequence:
        """Make the sequence of an answer. No token goes through the model yet."""
        request = answer.request
        k = self.experts_per_token(request)
        forced = answer.within_limit(answer.constraint.begin_answer())
        prefill = self._reader.start(
            answer.prompt, answer.emit, experts=k, keep=request.cache, forced=forced
        )
        sampler = Sampler(
            self._sampler_settings(request),
            request.repetition_penalty,
            secrets.randbits(64) if request.seed is None else request.seed,
            [*answer.prompt.tokens, *forced],
        )
        return ActiveSequence(self.model, answer, prefill, sampler, k, forced)

    def experts_per_token(self, request: Request) -> int:
        """Return K of a request.

        Raises:
            SettingError: the model cannot run with it.
        """
        wanted = request.experts
        return self.model.experts if wanted is None else self.model.check_experts(wanted)

    def store_prompt(self, prefill: PromptPrefill) -> None:
        """Write the prompt cache entries of a prompt to disk, for the next process."""
        self._reader.store(prefill)

    def _max_tokens(self, request: Request, prompt: list[int]) -> int:
        left = self.checkpoint.max_context - len(prompt)
        if left < 1:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, and the context of this model is "
                f"{self.checkpoint.max_context}: shorten the prompt or start a new conversation"
            )
        wanted = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        return min(left, wanted)

    def _sampler_settings(self, request: Request) -> dict[str, Any]:
        """Return arguments of mlx-lm's make_sampler."""

        def value(name: str, off: float) -> Any:
            own = getattr(request, name)
            return self._defaults.get(name, off) if own is None else own

        top_k = value("top_k", 0)
        return {
            "temp": value("temperature", 0.0),
            "top_p": value("top_p", 0.0),
            # mlx-lm wants fewer than the vocabulary has; that many is no limit.
            "top_k": 0 if top_k >= self.checkpoint.text_config["vocab_size"] else top_k,
            "min_p": value("min_p", 0.0),
        }


def _load(checkpoint: Checkpoint, options: EngineOptions) -> tuple[Cluster | None, StreamingMoE]:
    """Load the model, on the lead of a cluster if the options name one."""
    if options.cluster is None:
        return None, load_streaming(checkpoint, options)
    from ..cluster.lead import Cluster  # late: it is rarely needed

    cluster = Cluster(checkpoint, options.cluster, options.activations)
    try:
        model = load_streaming(
            checkpoint,
            options,
            backend=cluster.backend,
            held=cluster.held,
            reserved=cluster.nbytes,
        )
        cluster.join(model)
    except BaseException:
        cluster.close()
        raise
    return cluster, model


def sampling_defaults(path: Path) -> dict[str, float]:
    """Return temperature, top_p, top_k and min_p as generation_config.json has them.

    mlx-lm reads only the end tokens of that file. Impossible values are left out.
    """
    try:
        config = json.loads((path / "generation_config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("do_sample") is False:
        return {}
    kinds: dict[str, tuple[type, ...]] = {
        "temperature": (int, float),
        "top_p": (int, float),
        "top_k": (int,),
        "min_p": (int, float),
    }
    return {
        name: config[name]
        for name, kind in kinds.items()
        if isinstance(config.get(name), kind)
        and not isinstance(config[name], bool)
        and in_range(name, config[name])
    }
