"""A loaded model and what it takes to answer requests with it. Lives on the engine's thread."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from ..chat.output_parser import OutputParser
from ..chat.special_tokens import SpecialTokens
from ..chat.template import ChatTemplate
from ..chat.tools import check_tool_choice, read_tools
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import ContextError
from ..events import Event
from ..grammar import response as grammars
from ..grammar.constraint import Constraint, MatcherFactory
from ..memory import budget as memory
from ..memory import footprint
from ..models.loading import load_streaming
from ..requests import Request, in_range
from .answer import AnswerState
from .prompt import PromptPrefill, PromptReader
from .prompt_cache import PromptCache
from .prompt_store import DEFAULT_LIMIT, PromptStore
from .sampling import Sampler
from .sequence import ActiveSequence

DEFAULT_MAX_TOKENS = 4096


class LoadedModel:
    """One model.

    Args:
        path, memory, slots, experts, depth, io, activations: as `flashmoe.load`.
        prompt_cache: bytes of prompt states in memory, or a size such as "1GB"; 0: none. None: as
            many as one conversation of the planned length takes.
        prompt_store: the same on disk.
        prompt_store_path: the directory of these. None: the platform's place for caches.
        cluster: the shares of the hosts, when there are several: see `flashmoe.cluster.placement`.
    """

    def __init__(
        self,
        path: Path,
        *,
        prompt_cache: int | str | None = None,
        prompt_store: int | str = DEFAULT_LIMIT,
        prompt_store_path: str | Path | None = None,
        cluster: str | None = None,
        **settings,
    ):
        limits = [memory.parse_size(x) if x else x for x in (prompt_cache, prompt_store)]
        self.checkpoint = Checkpoint.open(path)
        self.tokenizer = read_tokenizer(self.checkpoint)
        self._cluster = None
        if cluster is not None:
            from ..cluster.lead import Cluster

            activations = settings.get("activations") or "float32"
            self._cluster = Cluster(self.checkpoint, cluster, activations)
        try:
            self.model = load_streaming(
                self.checkpoint, prompt_cache=limits[0], cluster=self._cluster, **settings
            )
        except BaseException:
            if self._cluster is not None:
                self._cluster.close()
            raise
        self.special_tokens = SpecialTokens.from_tokenizer(self.tokenizer)
        self.template = ChatTemplate(self.tokenizer, self.special_tokens)
        self._defaults = sampling_defaults(self.checkpoint.path)
        width = self.checkpoint.text_config["vocab_size"]
        self._matchers = MatcherFactory(self.tokenizer, self.special_tokens, width)
        held = limits[0]
        self.prompts = PromptCache(
            footprint.prompt_cache_nbytes(self.checkpoint) if held is None else held
        )
        directory = None if prompt_store_path is None else Path(prompt_store_path)
        self.store = PromptStore(directory, limits[1]) if limits[1] else None
        self._reader = PromptReader(self.model, self.prompts, self.store)

    def close(self) -> None:
        """Free the prompt states and end the reader's threads, and the other hosts."""
        self.prompts.clear()
        self.model.close()
        if self._cluster is not None:
            self._cluster.close()

    def rest(self) -> None:
        """There is nothing to do for a while."""
        if self._cluster is not None:
            self._cluster.rest()

    def prepare(
        self,
        request: Request,
        emit: Callable[[Event], None],
        cancelled: threading.Event,
    ) -> AnswerState:
        """All that can be refused is refused here, before any work of the model.

        Args:
            emit: takes the events of the answer.
            cancelled: set when nobody waits for it any more.

        Raises:
            SettingError: the request has a value that cannot be.
            ContextError: the prompt is longer than the context.
        """
        start = perf_counter()
        self.k(request)
        tools = read_tools(request.tools)
        check_tool_choice(request.tool_choice, tools)
        wanted = request.response_format
        response_format = grammars.read_response_format(wanted) if wanted else None
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
                self._matchers, self.special_tokens, newlines, request, tools, response_format, prompt.in_reasoning
            ),
            parser=OutputParser(self.tokenizer, self.special_tokens, tools, request.stop, prompt.in_reasoning),
            emit=emit,
            cancelled=cancelled,
            started=start,
        )

    def begin(self, turn: AnswerState) -> ActiveSequence:
        """Find what of the prompt has to be read. Nothing is read yet."""
        k, request = self.k(turn.request), turn.request
        forced = turn.within_limit(turn.constraint.begin_answer())
        reading = self._reader.begin(
            turn.prompt, turn.emit, experts=k, keep=request.cache, forced=forced
        )
        sampling = Sampler(
            self._sampling(request),
            request.repetition_penalty,
            secrets.randbits(64) if request.seed is None else request.seed,
            [*turn.prompt.tokens, *forced],
        )
        return ActiveSequence(self.model, turn, reading, sampling, k, forced)

    def k(self, request: Request) -> int:
        """K of a request.

        Raises:
            SettingError: the model cannot run with it.
        """
        wanted = request.experts
        return self.model.experts if wanted is None else self.model.check_experts(wanted)

    def keep(self, reading: PromptPrefill) -> None:
        """Keep the states of a prompt that was read for the next process."""
        self._reader.store(reading)

    def _max_tokens(self, request: Request, prompt: list[int]) -> int:
        room = self.checkpoint.max_context - len(prompt)
        if room < 1:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, and the context of this model is "
                f"{self.checkpoint.max_context}: shorten the prompt or start a new conversation"
            )
        wanted = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        return min(room, wanted)

    def _sampling(self, request: Request) -> dict[str, float]:
        """Arguments of mlx-lm's make_sampler."""

        def value(name, off):
            own = getattr(request, name)
            return self._defaults.get(name, off) if own is None else own

        top_k = value("top_k", 0)
        return {
            "temp": value("temperature", 0.0),
            "top_p": value("top_p", 0.0),
            # mlx-lm wants fewer than there are; that many is no limit.
            "top_k": 0 if top_k >= self.checkpoint.text_config["vocab_size"] else top_k,
            "min_p": value("min_p", 0.0),
        }


def sampling_defaults(path: Path) -> dict[str, float]:
    """temperature, top_p, top_k and min_p as generation_config.json has them.

    mlx-lm reads only the end tokens of that file. Values that cannot be are left out.
    """
    try:
        config = json.loads((path / "generation_config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("do_sample") is False:
        return {}
    kinds = {
        "temperature": (int, float),
        "top_p": (int, float),
        "top_k": int,
        "min_p": (int, float),
    }
    return {
        name: config[name]
        for name, kind in kinds.items()
        if isinstance(config.get(name), kind)
        and not isinstance(config[name], bool)
        and in_range(name, config[name])
    }
