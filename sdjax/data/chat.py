"""Turning prompts into tokens through the tokenizer's own chat template, and tokens into text.

Thinking on or off is a variable of the template (Qwen3's `enable_thinking`); templates that do not
know it ignore it. Never imports jax.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data import hub

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
Messages = Sequence[Mapping[str, str]]


def load_tokenizer(path: str) -> Any:
    """The Hugging Face tokenizer of a model's folder, bucket URL, hub name, or "tiny"."""
    # Without it, importing transformers complains that PyTorch is missing; nobody needs it here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    folder = hub.resolve(path)
    local = hub.local_tokenizer_folder(folder)
    try:
        # Without this check transformers makes an empty tokenizer up from config.json alone.
        if not any(os.path.exists(os.path.join(local, name)) for name in VOCABULARIES):
            raise OSError(f"there is none of {', '.join(VOCABULARIES)}")
        return transformers.AutoTokenizer.from_pretrained(local)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path={path!r}: no tokenizer could be read from {folder} "
            f"({str(error).splitlines()[0]}): put tokenizer.json and tokenizer_config.json there"
        ) from error


def as_messages(prompt: str | Messages, system: str | None = None) -> list[dict[str, str]]:
    """A string becomes the user's turn; `system` goes before it unless there is one already."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return [dict(turn) for turn in turns]


def render_prompt(
    tokenizer: Any,
    prompt: str | Messages,
    *,
    enable_thinking: bool | None = None,
    system: str | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text the model sees, up to where its response begins.

    `chat_template` (Jinja text) replaces the tokenizer's own. Raises ValueError when there is none.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: set "
            "data.chat_template, for example \"{{ messages[-1]['content'] }}\" for a base model"
        )
    variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    return tokenizer.apply_chat_template(
        as_messages(prompt, system),
        chat_template=chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )


def encode_prompt(tokenizer: Any, prompt: str | Messages, **style: Any) -> np.ndarray:
    """Token ids of `render_prompt`, int32 [T].

    The template writes the special tokens itself, so the tokenizer must not add them again.
    """
    text = render_prompt(tokenizer, prompt, **style)
    return encode_text(tokenizer, text)


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of text as it stands, no special tokens added, int32 [T]."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)


def decode(tokenizer: Any, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of token ids, spaces as they were sampled."""
    return tokenizer.decode(
        [int(t) for t in token_ids],
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )


def end_token_ids(tokenizer: Any, generation: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """All tokens that end a response: those of generation_config.json and the tokenizer's own.

    Raises ValueError when there is none, because a response would then never end.
    """
    listed = (generation or {}).get("eos_token_id")
    ids = list(listed) if isinstance(listed, list | tuple) else [listed]
    ids = [int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None]
    if not ids:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no eos token and "
            "generation_config.json lists none: responses would never end; name one there"
        )
    return tuple(dict.fromkeys(ids))
