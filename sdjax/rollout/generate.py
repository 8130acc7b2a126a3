"""Sampling for people: mode='generate' on the command line, `sample` in a notebook.

    model = sdjax.models.from_pretrained("tiny")
    sdjax.rollout.sample(model, "What is 3 + 4?", stream=True)

Text streams as it is sampled, a decode chunk at a time. Not used by training or evaluation.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from sdjax.data import chat
from sdjax.models.config import ModelConfig
from sdjax.models.pretrained import Model, from_pretrained
from sdjax.parallel import single_device_mesh
from sdjax.records import Request, SamplingParams
from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.engine import Engine

CHUNK = 8  # steps between two pieces of streamed text


def sample(
    model: Model,
    prompts: str | Sequence[str],
    *,
    n: int = 1,
    max_new_tokens: int = 256,
    stream: bool = False,
    enable_thinking: bool | None = None,
    system: str | None = None,
    chat_template: str | None = None,
    out: TextIO | None = None,
    **sampling: Any,
) -> list[str]:
    """`n` responses to each prompt, as text, in the order of the prompts.

    `sampling` are fields of `SamplingParams` (temperature, top_k, top_p, min_p, seed). `stream`
    prints the first response to each prompt while it is sampled, to `out` or the standard output.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "the model's folder has no tokenizer: put tokenizer.json beside the weights"
        )
    style = dict(enable_thinking=enable_thinking, system=system, chat_template=chat_template)
    settings = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    tokens = [tuple(chat.encode_prompt(tokenizer, p, **style).tolist()) for p in prompts]
    requests = [Request(i, prompt, n, settings) for i, prompt in enumerate(tokens)]
    engine = _engine_for(model, requests)
    writer = Stream(tokenizer, out or sys.stdout) if stream else None
    done = engine.generate(model.params, requests, on_tokens=writer)
    if writer is not None:
        writer.close()
    return [chat.decode(tokenizer, completion.tokens) for completion in done]


def _engine_for(model: Model, requests: Iterable[Request]) -> Engine:
    """An engine with room for these requests, compiled at most once for each power of two."""
    requests = list(requests)
    ceiling = lambda count: 1 << max(4, (count - 1).bit_length())
    cfg = EngineConfig(
        slots=min(64, 1 << (sum(r.n for r in requests) - 1).bit_length()),
        max_prompt_len=ceiling(max(len(r.prompt_tokens) for r in requests)),
        max_new_tokens=ceiling(max(r.sampling.max_new_tokens for r in requests)),
        chunk=CHUNK,
        compute_dtype=str(model.params["embed"].dtype),
        row_halvings=0,
    )
    ends = chat.end_token_ids(model.tokenizer, model.generation)
    return _engine(model.cfg, cfg, model.mesh or single_device_mesh(), ends)


@functools.lru_cache(maxsize=8)
def _engine(model_cfg: ModelConfig, cfg: EngineConfig, mesh, ends: tuple[int, ...]) -> Engine:
    return Engine(model_cfg, cfg, mesh, ends)


class Stream:
    """Prints responses as their tokens come; of several at once, one after the other.

    Call it as the engine's `on_tokens`. Characters that are still incomplete wait for the rest.
    """

    def __init__(self, tokenizer: Any, out: TextIO):
        self.tokenizer, self.out = tokenizer, out
        self.tokens: dict[int, list[int]] = {}
        self.printed: dict[int, int] = {}

    def __call__(self, request_id: int, index: int, tokens: np.ndarray) -> None:
        if index == 0:
            self.tokens.setdefault(request_id, []).extend(tokens.tolist())
            if request_id == min(self.tokens):
                self._print(request_id)

    def _print(self, request_id: int, whole: bool = False) -> None:
        text = chat.decode(self.tokenizer, self.tokens[request_id])
        if not whole:
            text = text.rstrip("\ufffd")
        self.out.write(text[self.printed.get(request_id, 0) :])
        self.out.flush()
        self.printed[request_id] = len(text)

    def close(self) -> None:
        """Prints what the responses still owe, each ended by a line break."""
        for request_id in sorted(self.tokens):
            self._print(request_id, whole=True)
            self.out.write("\n")
        self.out.flush()


def run(
    c: Any,
    workdir: str,
    read: Callable[[], str] | None = None,
    out: TextIO | None = None,
) -> None:
    """mode='generate': answers `generate.prompt`, or the lines typed until an empty one.

    Samples from `model.path` with the settings of `sampling`. Responses are printed, nothing is
    written to the workdir.
    """
    del workdir
    out = out or sys.stdout
    model = from_pretrained(c.model.path, single_device_mesh(jax.local_devices()[0]))
    options = dict(
        n=c.generate.n,
        max_new_tokens=c.sampling.max_new_tokens,
        temperature=c.sampling.temperature,
        top_k=c.sampling.top_k,
        top_p=c.sampling.top_p,
        min_p=c.sampling.min_p,
        enable_thinking=c.data.enable_thinking,
        system=c.data.system,
        chat_template=c.data.chat_template,
    )
    if c.generate.prompt:
        _answer(model, c.generate.prompt, options | dict(seed=c.seed), out)
        return
    read = read or (lambda: input("> "))
    for turn in range(sys.maxsize):
        try:
            prompt = read().strip()
        except EOFError:
            return
        if not prompt:
            return
        _answer(model, prompt, options | dict(seed=c.seed + turn), out)


def _answer(model: Model, prompt: str, options: dict[str, Any], out: TextIO) -> None:
    """Streams a single response; prints several when they are complete."""
    stream = options["n"] == 1
    responses = sample(model, prompt, stream=stream, out=out, **options)
    if not stream:
        for index, response in enumerate(responses):
            print(f"--- {index}\n{response}", file=out)
