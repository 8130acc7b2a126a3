"""Prints the parity table of docs/models.md.

python tests/models/parity_table.py [SMOLLM2_DIR]        # from the repository's root
"""

import pathlib
import sys
import tempfile

import families
import numpy as np
import torch
from make_golden import logits, open_model

import sdjax.models
from sdjax.data import chat


def compare(folder, prompt, tokens, mask):
    """(largest difference of a logit, largest logit, greedy tokens that agree of 64)."""
    theirs_model, model = open_model(folder), sdjax.models.from_pretrained(folder)
    theirs = logits(theirs_model, tokens, mask)
    difference = np.abs(np.asarray(model.logits(tokens, mask)) - theirs)[mask > 0].max()
    out = theirs_model.generate(
        torch.as_tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
    ).numpy()
    first = prompt.shape[1]
    ours = np.asarray(model.logits(out[:, :-1]))[0, first - 1 :].argmax(-1)
    return difference, np.abs(theirs).max(), int((ours == out[0, first:]).sum())


def row(name, result):
    difference, largest, same = result
    print(f"| {name} | {difference:.1e} | {largest:.1f} | {same} of 64 |", flush=True)


def main():
    print("| checkpoint | largest difference | largest logit | greedy tokens that agree |")
    print("|---|---|---|---|")
    for name, raw in families.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            families.write_checkpoint(pathlib.Path(folder), raw)
            rows = families.token_batch(raw["vocab_size"])
            row(name, compare(folder, np.arange(3, 15)[None], *rows))
    if len(sys.argv) > 1:
        tokenizer = chat.load_tokenizer(sys.argv[1])
        prompt = chat.encode_prompt(tokenizer, families.SMOLLM2_PROMPT)[None]
        row("SmolLM2-135M-Instruct", compare(sys.argv[1], prompt, prompt, np.ones_like(prompt)))


if __name__ == "__main__":
    main()
