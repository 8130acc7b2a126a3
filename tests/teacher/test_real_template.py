"""The teacher's prompt through Qwen3's own tokenizer and chat template."""

import numpy as np
import pytest

from sdjax.data import chat
from sdjax.data.prompts import BOXED, problem_messages
from sdjax.records import Problem, Rollout, Verdict
from sdjax.teacher.context import ContextConfig, build_contexts


@pytest.fixture(scope="module")
def qwen(shared_dir):
    return chat.load_tokenizer(str(shared_dir / "tokenizers" / "qwen3"))


def group_of_two(tokenizer):
    problem = Problem("p", "What is 1+1?" + BOXED, "2")
    texts = ("<think>\none and one\n</think>\n\n\\boxed{2}<|im_end|>", "3<|im_end|>")
    return [
        Rollout(
            problem=problem,
            group=0,
            index=i,
            prompt_tokens=np.zeros(0, np.int32),
            response_tokens=chat.encode_text(tokenizer, text),
            sampler_logp=np.zeros(0, np.float32),
            finish_reason="eos",
            text="",
            verdict=Verdict(i == 0, None, "test"),
        )
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("thinking", [True, False])
def test_prompt_as_in_the_papers_runs(qwen, thinking):
    """METHODS 3.2 and 3.7: `<think>` survives decoding, the end token does not, and the header is
    that of the student (thinking off opens and closes an empty block)."""
    rollouts = group_of_two(qwen)
    contexts, _ = build_contexts(rollouts, ContextConfig(), qwen, enable_thinking=thinking)
    header = "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")
    assert contexts[1].text == (
        f"<|im_start|>user\nWhat is 1+1?{BOXED}\nCorrect solution:\n\n"
        "<think>\none and one\n</think>\n\n\\boxed{2}\n\n"
        f"Correctly solve the original question.<|im_end|>\n{header}"
    )
    student = chat.render_prompt(
        qwen, problem_messages(rollouts[1].problem), enable_thinking=thinking
    )
    assert student == f"<|im_start|>user\nWhat is 1+1?{BOXED}<|im_end|>\n{header}"
    assert chat.decode(qwen, contexts[1].prompt_tokens, False) == contexts[1].text
