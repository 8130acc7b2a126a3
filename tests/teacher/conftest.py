"""A byte-level tokenizer with a thinking switch in its chat template, and rollouts to order."""

import numpy as np
import pytest

from sdjax.records import Problem, Rollout, Verdict

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not "
    "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """One token per byte, plus the special tokens of TEMPLATE; <think> is text, as in Qwen3."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def make_rollout(tokenizer):
    """rollout(text, correct, group=0, ...) with the tokens of `text` and an end token."""

    def rollout(
        text, correct, group=0, *, prompt=None, solution=None, feedback=None, hint=None, history=()
    ):
        problem = Problem(
            id=f"p{group}",
            prompt=prompt or f"Q{group}",
            answer="1",
            solution=solution,
            feedback=hint,
            meta={"history": list(history)} if history else {},
        )
        tokens = tokenizer.encode(text + "<|end|>", add_special_tokens=False)
        return Rollout(
            problem=problem,
            group=group,
            index=0,
            prompt_tokens=np.zeros(0, np.int32),
            response_tokens=np.asarray(tokens, np.int32),
            sampler_logp=np.zeros(len(tokens), np.float32),
            finish_reason="eos",
            text=text,
            verdict=Verdict(correct, None, "test", feedback),
        )

    return rollout
