"""Hold a loaded model and what it takes to answer requests with it, on the engine's thread."""

from __future__ import annotations

import secrets
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..bounded import calls
from ..chat.output_parser import OutputParser
from ..chat.special_tokens import SpecialTokens
from ..chat.template import ChatTemplate
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import ContextError, SettingError
from ..grammar.constraint import Constraint, MatcherFactory
from ..grammar.rules import output_rules
from ..models.loading import load_streaming
from ..options import EngineOptions
from ..requests import SMALLEST, Request, bias_token
from .answer import AnswerState
from .delivery import Delivery
from .job import Job
from .logprobs import LogprobReporter
from .prompt import PromptPrefill, PromptReader
from .prompt_cache import PromptCache, open_store
from .sampling import Penalties, Sampler
from .sequence import ActiveSequence

if TYPE_CHECKING:
    from ..cluster.lead import Cluster
    from ..models.streaming_moe import StreamingMoE

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
        self._defaults = self.checkpoint.generation.sampling
        width = self.checkpoint.text_config["vocab_size"]
        self._matchers = MatcherFactory(self.tokenizer, self.special_tokens, width)
        self.prompt_cache = PromptCache(self.model.plan.cached)
        directory = options.prompt_store_path
        self.prompt_store = open_store(
            None if directory is None else Path(directory), options.prompt_store_nbytes
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

    def prepare_answer(self, job: Job) -> AnswerState:
        """Check a request and build its prompt, before the model does any work. On any thread.

        Raises:
            SettingError: the request has an impossible value.
            ContextError: the prompt is longer than the context.
        """
        start, request = perf_counter(), job.request
        self.experts_per_token(request)
        self._biases(request)
        rules = output_rules(request, self.special_tokens)
        must_call = request.tool_choice not in ("auto", "none")
        if request.prompt is not None:
            prompt = self.template.raw_prompt(request.prompt)
        else:
            prompt = self.template.build_prompt(
                request.messages,
                rules.tools,
                think=request.think,
                structured=request.constrain and (rules.structured or must_call),
                variables=request.chat_template_kwargs,
                continue_last=request.continue_last,
            )
        max_tokens = self._max_tokens(request, prompt.tokens)
        newlines = self.template.encode("\n"), self.template.encode("\n\n")
        parser = OutputParser(
            self.tokenizer,
            self.special_tokens,
            rules.tools,
            request.stop,
            prompt.in_reasoning,
            calls.call,
            continues=prompt.continues,
        )
        return AnswerState(
            request=request,
            prompt=prompt,
            rules=rules,
            max_tokens=max_tokens,
            constraint=Constraint(
                self._matchers, self.special_tokens, newlines, request, rules, prompt.in_reasoning
            ),
            parser=parser,
            delivery=Delivery(job),
            cancelled=job.cancelled,
            started=perf_counter() - start,
            logprobs=None if request.logprobs is None else LogprobReporter(self.tokenizer),
        )

    def start_sequence(self, answer: AnswerState) -> ActiveSequence:
        """Make the sequence of an answer. No token goes through the model yet."""
        request = answer.request
        answer.started = perf_counter() - answer.started
        k = self.experts_per_token(request)
        forced = answer.within_limit(answer.constraint.begin_answer())
        prefill = self._reader.start(
            answer.prompt, answer.delivery.event, experts=k, keep=request.cache, forced=forced
        )
        penalties = Penalties(
            request.repetition_penalty,
            request.presence_penalty,
            request.frequency_penalty,
            self._biases(request),
        )
        seed = secrets.randbits(64) if request.seed is None else request.seed
        settings = self._sampler_settings(request)
        sampler = Sampler(settings, penalties, seed, answer.prompt.tokens, request.logprobs)
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

    def _biases(self, request: Request) -> dict[int, float]:
        """Return what is added to the logits, by token.

        Raises:
            SettingError: the model has no such token.
        """
        biases = {}
        size = self.checkpoint.text_config["vocab_size"]
        for key, bias in (request.logit_bias or {}).items():
            token = bias_token(key)
            if token is None or token >= size:
                raise SettingError(
                    f"logit_bias has the token {key!r}: this model has the tokens 0 to {size - 1}"
                )
            biases[token] = float(bias)
        return biases

    def _sampler_settings(self, request: Request) -> dict[str, Any]:
        """Return arguments of mlx-lm's make_sampler."""

        def value(name: str, off: float) -> Any:
            own = getattr(request, name)
            return self._defaults.get(name, off) if own is None else own

        top_k = value("top_k", 0)
        temperature = value("temperature", 0.0)
        return {
            "temp": temperature if temperature >= SMALLEST else 0.0,
            "top_p": max(value("top_p", 1.0), SMALLEST),
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
