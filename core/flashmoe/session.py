"""A loaded model and what it takes to answer a request with it. Lives on the engine's thread."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler

from . import memory
from .chat import Reply, render
from .checkpoint import Checkpoint
from .errors import Cancelled, SettingError
from .events import End, Event, Request, in_range
from .footprint import PREFILL_TOKENS
from .loading import load
from .models import check_experts

DEFAULT_MAX_TOKENS = 4096


class Session:
    """One model.

    Args: as `flashmoe.load`.
    """

    def __init__(self, path: Path, **settings):
        self.model, self.tokenizer = load(path, **settings)
        self.checkpoint = self.model.checkpoint
        self._defaults = sampling_defaults(self.checkpoint.path)

    def generate(self, request: Request, cancelled: threading.Event) -> Iterator[Event]:
        """The events of one answer.

        Raises:
            Cancelled: `cancelled` was set.
            SettingError: the request has a value out of range, or does not fit the context.
            ReadError: an expert could not be read.
        """
        check_experts(request.experts, self.checkpoint)
        prompt = render(self.tokenizer, request.messages)
        max_tokens = self._max_tokens(request, prompt)
        mx.random.seed(secrets.randbits(64) if request.seed is None else request.seed)
        reply = Reply(self.tokenizer, prompt, request.stop)

        def check(*progress) -> None:
            if cancelled.is_set():
                raise Cancelled

        self.model.watch.check = check
        start = first = perf_counter()
        before = self.model.stats
        generated = thought = 0
        reason = "length"
        with self.model.pruned_to(request.experts):
            responses = stream_generate(
                self.model,
                self.tokenizer,
                prompt,
                max_tokens=max_tokens,
                sampler=self._sampler(request),
                prefill_step_size=PREFILL_TOKENS,
                prompt_progress_callback=check,
            )
            try:
                for response in responses:
                    check()
                    if generated == 0:
                        first = perf_counter()
                    # The last response repeats the count of its token.
                    thought += reply.reasoning and response.generation_tokens > generated
                    generated = response.generation_tokens
                    yield from reply.feed(response.text)
                    if reply.stopped:
                        reason = "stop"
                        break
                    reason = response.finish_reason or reason
            finally:
                responses.close()
            yield from reply.flush()
            end = perf_counter()
            streamed = self.model.stats - before
            yield End(
                finish_reason=reason,
                prompt_tokens=len(prompt),
                generated_tokens=generated,
                reasoning_tokens=int(thought),
                prompt_seconds=first - start,
                seconds=end - first,
                experts=self.model.experts,
                trained_experts=self.checkpoint.top_k,
                bits=expert_bits(self.checkpoint),
                hit_rate=streamed.hit_rate,
                bytes_read=streamed.reads.bytes,
                wait_seconds=streamed.reads.wait_seconds,
                peak_nbytes=memory.peak(),
            )

    def close(self) -> None:
        self.model.close()

    def _max_tokens(self, request: Request, prompt: list[int]) -> int:
        room = self.checkpoint.max_context - len(prompt)
        if room < 1:
            raise SettingError(
                f"the prompt has {len(prompt)} tokens, and the context of this model is "
                f"{self.checkpoint.max_context}: shorten the prompt or start a new conversation"
            )
        wanted = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        return min(room, wanted)

    def _sampler(self, request: Request):
        def value(name, off):
            own = getattr(request, name)
            return self._defaults.get(name, off) if own is None else own

        top_k = value("top_k", 0)
        return make_sampler(
            temp=value("temperature", 0.0),
            top_p=value("top_p", 0.0),
            # mlx-lm wants fewer than there are; that many is no limit.
            top_k=0 if top_k >= self.checkpoint.text_config["vocab_size"] else top_k,
            min_p=value("min_p", 0.0),
        )


def expert_bits(checkpoint: Checkpoint) -> float:
    """Bits of an expert weight, 16 or 32 when unquantised; the mean where projections differ."""
    bits = [
        (32 if part.dtype == "F32" else 16)
        if layer.quantization[part.projection] is None
        else layer.quantization[part.projection].bits
        for layer in checkpoint.expert_layers.values()
        for part in layer.parts
        if part.part == "weight"
    ]
    return sum(bits) / len(bits)


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
