"""Builds the tokenizer of the embedded tiny model and writes it in the Hugging Face format.

The vocabulary is written down here, not learnt: 256 bytes (so any text can be encoded and comes
back unchanged), the words of the synthetic problems, the ten epistemic words, and whole phrases of
the paper's prompts as single tokens, because on a laptop every token costs. The longest piece that
fits is taken, from left to right. Digits are always single tokens.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from sdjax.data.prompts import BOXED
from sdjax.data.synthetic import DAYS, ITEMS, NAMES
from sdjax.teacher.templates import PAPER_CLOSING, UNCERTAIN_CLOSING

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, THINK_END = "<think>", "</think>"
EPISTEMIC = (
    "wait",
    "hmm",
    "perhaps",
    "maybe",
    "actually",
    "alternatively",
    "seems",
    "might",
    "likely",
    "check",
)
PHRASES = (
    BOXED,
    BOXED.strip(),
    "Correct solution:",
    PAPER_CLOSING,
    UNCERTAIN_CLOSING,
    "The following is feedback from your unsuccessful earlier attempt:",
    "Your answer is incorrect.",
    " The correct answer is",
    "Your answer had the wrong format.",
    " The solution must be given in the format: \\boxed{your_answer}.",
    "Your response was truncated because it exceeded the maximum length.",
    "The answer is",
    " Find the result.",
    " Find the larger value.",
    "Which is larger, ",
    " How many are left?",
    " How many are left over?",
    " How many pages?",
    " Find the number.",
)
MARKS = ("\n\n", ", ", ". ", ": ", " \\boxed{", "\\boxed{", "}.", " mod ")
WORDS = (
    "user assistant system Find Compute Which What How many Start with add subtract multiply by "
    "then is are the The a A of or and for from to in on has have gets buys loses reads shares "
    "all friends boxes pages more left over larger smaller value result number answer correct "
    "incorrect solution day days after before sequence starts term plus minus times right off be "
    "so same it not mod"
).split()
VOCAB_MULTIPLE = 64  # so that the vocabulary axis splits over devices

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and not loop.last and '</think>' in message.content %}
{{- message.content.split('</think>')[-1].lstrip('\\n') }}
{%- else %}
{{- message.content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def pieces() -> list[str]:
    """All pieces of more than one character, each once: phrases, marks, words as they occur."""
    found = [*PHRASES, *MARKS]
    for word in (*WORDS, *DAYS, *NAMES, *ITEMS):
        found += [word, " " + word]
    for word in EPISTEMIC:
        found += [word, " " + word, word.capitalize()]
    return list(dict.fromkeys(piece for piece in found if len(piece) > 1))


def build() -> Any:
    """The tokenizer as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    tokens = letters + ["".join(letters[b] for b in piece.encode()) for piece in pieces()]
    added = (PAD, START, END, THINK, THINK_END)
    room = -(len(tokens) + len(added)) % VOCAB_MULTIPLE
    tokens += [f"<|unused_{i}|>" for i in range(room)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    longest_first = sorted(pieces(), key=len, reverse=True)
    pattern = "|".join(re.escape(piece) for piece in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, START, END)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (THINK, THINK_END)])
    return tokenizer


def save(folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "pad_token": PAD,
        "eos_token": END,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load() -> Any:
    """The tokenizer as transformers loads it, without writing it to the package."""
    from sdjax.data import chat

    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return chat.load_tokenizer(folder)
