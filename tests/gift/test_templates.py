"""Named templates: the published formats to the letter, one begin token, and what a tokenizer cannot render."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gift.cli import UserError
from gift.data import Example, encode_prompt
from gift.templates import TEMPLATES, apply_template

CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


def byte_tokenizer(special: list[str], *, bos: str | None = None, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and these special ones; with `add_bos`, texts begin with `bos` as Llama's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=special[-1])


def qwen() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CHATML)


def llama() -> PreTrainedTokenizerFast:
    return byte_tokenizer(LLAMA, bos="<|begin_of_text|>", add_bos=True)


USER = [("user", "1+1?")]
SYSTEM = [("system", "Be brief."), ("user", "1+1?")]
DIALOGUE = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
RENDERED = [
    (qwen, "plain", USER, "1+1?"),
    (qwen, "plain", DIALOGUE, "1+1?2\n\n2+2?"),
    (llama, "plain", USER, "<|begin_of_text|>1+1?"),
    (qwen, "question-answer", USER, "Question: 1+1?\nAnswer:"),
    (qwen, "question-answer", SYSTEM, "Be brief.\n\nQuestion: 1+1?\nAnswer:"),
    (qwen, "question-answer", DIALOGUE, "Question: 1+1?\nAnswer:2\n\nQuestion: 2+2?\nAnswer:"),
    (llama, "question-answer", USER, "<|begin_of_text|>Question: 1+1?\nAnswer:"),
    (qwen, "boxed", USER, f"<|im_start|>user\n1+1?\n{BOXED}<|im_end|>\n<|im_start|>assistant\n"),
    (
        qwen,
        "boxed",
        SYSTEM,
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?\n{BOXED}<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        qwen,
        "qwen-math",
        USER,
        f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        qwen,
        "qwen-math",
        SYSTEM,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        llama,
        "llama-3",
        SYSTEM,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
]


@pytest.mark.parametrize(("make", "name", "turns", "expected"), RENDERED)
def test_a_template_renders_its_published_format(tmp_path, make, name, turns, expected):
    tokenizer = make()
    apply_template(tokenizer, name)
    tokenizer.save_pretrained(tmp_path)  # an exported checkpoint carries the template
    for carrier in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = encode_prompt(carrier, Example("e", "text", "response", "answer", tuple(turns)))
        assert carrier.decode(ids) == expected
        # Special tokens are whole: everything else is one token per byte.
        special = [id for id in ids if id in carrier.all_special_ids or id >= 256]
        assert len(special) == expected.count("<|")
        assert len(ids) - len(special) == len(expected.replace("<|", "\0<|").split("\0")[0]) + sum(
            len(part.partition("|>")[2]) for part in expected.split("<|")[1:]
        )


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1),
    response=st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1).filter(
        lambda text: text == text.strip()
    ),
)
def test_a_prompt_begins_the_conversation_with_its_response(name, prompt, response):
    tokenizer = llama() if name == "llama-3" else qwen()
    apply_template(tokenizer, name)
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    before = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert whole.startswith(before + response)
    assert whole.removeprefix(before + response) in {"", "<|im_end|>\n", "<|eot_id|>"}


def test_plain_is_what_a_tokenizer_without_a_template_gets():
    for make in (qwen, llama):
        bare, templated = make(), make()
        apply_template(templated, "plain")
        assert encode_prompt(templated, "1+1?") == encode_prompt(bare, "1+1?")


def test_unknown_templates_are_named():
    with pytest.raises(UserError, match=r"no template 'qwen_math' \(did you mean 'qwen-math'\?\); there are plain, "):
        apply_template(qwen(), "qwen_math")


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused():
    with pytest.raises(
        UserError, match=r"'llama-3' needs the token '<\|begin_of_text\|>'.*: plain, question-answer, b"
    ):
        apply_template(qwen(), "llama-3")
    with pytest.raises(
        UserError, match=r"'boxed' needs the token '<\|im_start\|>'.* fit it: plain, .*-answer, llama-3"
    ):
        apply_template(llama(), "boxed")
