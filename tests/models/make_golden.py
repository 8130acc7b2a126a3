"""Writes golden/*.npz: logits of `transformers` on PyTorch, for machines that lack PyTorch.

    python tests/models/make_golden.py [SMOLLM2_DIR]        # from the repository's root

The numbers are ours to make again: weights are seeded by name (families.py); torch 2.13.0 and
transformers 5.24.0 made the stored ones (SmolLM2's: 5.23.0).
"""

import pathlib
import sys
import tempfile

import families
import numpy as np
import torch
import transformers

from sdjax.data import chat

GOLDEN = pathlib.Path(__file__).parent / "golden"


def logits(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.as_tensor(tokens, dtype=torch.long),
            attention_mask=torch.as_tensor(mask),
            position_ids=torch.as_tensor(positions),
        ).logits.numpy()


def open_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def write_families():
    out = {}
    for name, raw in families.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            tensors = families.write_checkpoint(pathlib.Path(folder), raw)
            model = open_model(folder)
            assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
                n: x.shape for n, x in tensors.items()
            }
            tokens, mask = families.token_batch(raw["vocab_size"])
            out[name] = families.sample_of(logits(model, tokens, mask))
    np.savez_compressed(GOLDEN / "families.npz", **out)


def write_smollm2(folder):
    model, tokenizer = open_model(folder), chat.load_tokenizer(folder)
    prompt = chat.encode_prompt(tokenizer, families.SMOLLM2_PROMPT)[None]
    tokens = model.generate(
        torch.as_tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),  # else <|im_end|> is masked
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
    ).numpy()
    values = logits(model, tokens[:, :-1], np.ones_like(tokens[:, :-1]))
    np.savez_compressed(
        GOLDEN / "smollm2.npz",
        tokens=tokens.astype(np.int32),
        prompt_len=prompt.shape[1],
        logits=values[0, ::8, ::251],
    )


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    write_families()
    if len(sys.argv) > 1:
        write_smollm2(sys.argv[1])
