"""A loaded model and what it takes to answer a request with it. Lives on the engine's thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler
from transformers.utils import logging as transformers_logging

from . import memory
from .chat import Reply, render
from .checkpoint import Checkpoint
from .engine import Cancelled
from .errors import SettingError
from .events import End, Event, Request
from .footprint import PREFILL_TOKENS
from .models import check_experts, load

DEFAULT_MAX_TOKENS = 4096


# Its warning about long prompts would come before our error, which has both numbers.
transformers_logging.set_verbosity_error()


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
        check_request(request)
        check_experts(request.experts, self.checkpoint)
        prompt = render(self.tokenizer, request.messages)
        max_tokens = self._max_tokens(request, prompt)
        if request.seed is not None:
            mx.random.seed(request.seed)
        reply = Reply(self.tokenizer, prompt, request.stop)

        def on_prefill(done: int, total: int) -> None:
            if cancelled.is_set():
                raise Cancelled

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
                prompt_progress_callback=on_prefill,
            )
            try:
                for response in responses:
                    if cancelled.is_set():
                        raise Cancelled
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

        return make_sampler(
            temp=value("temperature", 0.0),
            top_p=value("top_p", 0.0),
            top_k=value("top_k", 0),
            min_p=value("min_p", 0.0),
        )


def expert_bits(checkpoint: Checkpoint) -> float:
    """Bits of an expert weight, the mean where projections or layers differ; 16 or 32 unquantised."""
    bits = [
        (32 if part.dtype == "F32" else 16)
        if layer.quantization[part.projection] is None
        else layer.quantization[part.projection].bits
        for layer in checkpoint.expert_layers.values()
        for part in layer.parts
        if part.part == "weight"
    ]
    return sum(bits) / len(bits)


def check_request(request: Request) -> None:
    """Refuse values out of range, naming the option.

    Raises:
        SettingError
    """
    ranges = {
        "max_tokens": (1, None),
        "temperature": (0, None),
        "top_p": (0, 1),
        "top_k": (0, None),
        "min_p": (0, 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(request, name)
        if value is None:
            continue
        if not value >= low or (high is not None and value > high):
            allowed = f"{low} to {high}" if high is not None else f"{low} or more"
            raise SettingError(f"{name}={value} is out of range: it must be {allowed}")
    if any(not text for text in request.stop):
        raise SettingError("a stop string is empty: it would end every answer at once")


def sampling_defaults(path: Path) -> dict[str, float]:
    """temperature, top_p, top_k and min_p as generation_config.json has them.

    mlx-lm reads only the end tokens of that file. Values that are not numbers are left out.
    """
    try:
        config = json.loads((path / "generation_config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("do_sample") is False:
        return {}
    names = ("temperature", "top_p", "top_k", "min_p")
    return {
        n: config[n]
        for n in names
        if isinstance(config.get(n), int | float) and not isinstance(config[n], bool)
    }
