"""Chat templates of the paper's models, text for text and token for token (METHODS 3.7)."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdjax.data import chat

PROMPT = "What is 3 + 4?"
# As published in tokenizer_config.json, without the branches for tools.
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}"
    "{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
OLMO_SYSTEM = "You are a helpful AI assistant."
OLMO = (
    "{%- set has_system = messages | selectattr('role', 'equalto', 'system') | list | length > 0"
    " -%}"
    "{%- if not has_system -%}{{ '<|im_start|>system\n"
    + OLMO_SYSTEM
    + "<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def tokenizer_with(template, bos="<｜begin▁of▁sentence｜>", eos="<|im_end|>"):
    """One token per character, and a tokenizer that would add BOS by itself if it were let."""
    letters = sorted({chr(i) for i in range(32, 127)} | {"\n", "｜", "▁"})
    vocab = {token: i for i, token in enumerate([bos, eos, "<unk>", *letters])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, unk_token="<unk>", add_bos_token=True
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def qwen3(shared_dir):
    return chat.load_tokenizer(str(shared_dir / "tokenizers" / "qwen3"))


@pytest.mark.parametrize(
    ("thinking", "end"),
    [(True, ""), (None, ""), (False, "<think>\n\n</think>\n\n")],
)
def test_qwen3_thinking_on_and_off(qwen3, thinking, end):
    """Off adds an empty thinking block; on and unset leave the model to open it."""
    text = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n{end}"
    assert chat.render_prompt(qwen3, PROMPT, enable_thinking=thinking) == text
    ids = chat.encode_prompt(qwen3, PROMPT, enable_thinking=thinking)
    assert ids.dtype == np.int32
    assert chat.decode(qwen3, ids, skip_special_tokens=False) == text
    # <|im_start|>, "user", newline, 3, ..., <|im_end|>: special tokens are one token each
    assert ids[0] == 151644 and list(ids).count(151645) == 1 and list(ids).count(151644) == 2
    assert list(ids[-4:]) == [151667, 271, 151668, 271] if end else list(ids[-2:]) == [77091, 198]


def test_qwen3_demonstration_stays_whole_in_the_user_turn(qwen3):
    """Templates drop the thinking of earlier assistant turns, not what a user quotes."""
    shown = "Example:\n<think>\nadd\n</think>\n7"
    assert shown in chat.render_prompt(qwen3, shown, enable_thinking=True)


def test_deepseek_starts_inside_thinking():
    tokenizer = tokenizer_with(DEEPSEEK, eos="<｜end▁of▁sentence｜>")
    text = chat.render_prompt(tokenizer, PROMPT, enable_thinking=True)
    assert text == f"<｜begin▁of▁sentence｜><｜User｜>{PROMPT}<｜Assistant｜><think>\n"
    ids = chat.encode_prompt(tokenizer, PROMPT)
    assert list(ids).count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_olmo_writes_its_system_message():
    tokenizer = tokenizer_with(OLMO)
    turns = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    default = f"<|im_start|>system\n{OLMO_SYSTEM}<|im_end|>\n"
    assert chat.render_prompt(tokenizer, PROMPT) == default + turns
    own = chat.render_prompt(tokenizer, PROMPT, system="Be brief.")
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns


def test_smollm2_default_system(shared_dir):
    tokenizer = chat.load_tokenizer(str(shared_dir / "tokenizers" / "smollm2"))
    assert chat.render_prompt(tokenizer, PROMPT) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_keep_their_own_system():
    messages = [{"role": "system", "content": "A"}, {"role": "user", "content": PROMPT}]
    text = chat.render_prompt(tokenizer_with(OLMO), messages, system="B")
    assert "system\nA" in text and "B" not in text


def test_no_template_is_refused_unless_the_config_has_one():
    tokenizer = tokenizer_with(None)
    with pytest.raises(ValueError, match="no chat template: set data.chat_template"):
        chat.render_prompt(tokenizer, PROMPT)
    raw = "{{ bos_token }}{{ messages[-1]['content'] }}"
    assert chat.render_prompt(tokenizer, PROMPT, chat_template=raw) == (
        f"{tokenizer.bos_token}{PROMPT}"
    )


def test_all_end_tokens_are_honoured():
    """Qwen3 lists two; a tokenizer's own counts too; none at all would never stop."""
    tokenizer = tokenizer_with(OLMO)
    assert chat.end_token_ids(tokenizer, {"eos_token_id": [7, 1]}) == (7, 1)
    assert chat.end_token_ids(tokenizer, {"eos_token_id": 9}) == (9, 1)
    assert chat.end_token_ids(tokenizer) == (1,)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="never end"):
        chat.end_token_ids(tokenizer, {})


def test_spaces_survive_decoding(qwen3):
    """Cleaning up would glue " ," and change what the verifier reads."""
    text = "a , b . it 's  7 !"
    assert chat.decode(qwen3, chat.encode_text(qwen3, text)) == text


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ValueError, match="no tokenizer could be read"):
        chat.load_tokenizer(str(tmp_path))
