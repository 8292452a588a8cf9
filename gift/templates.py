r"""Named prompt templates: how messages become the text a model continues, where its own chat template is not wanted.

A template is a small Jinja chat template. `apply_template` puts it into the tokenizer, so that training, sampling and
every exported checkpoint use the same one. Whatever the template, a trained response ends with the tokenizer's own end
token. A prompt with its generation prompt is always the beginning of the same conversation with the response.

    plain            the prompt's bare text, what a tokenizer without a chat template gets
    question-answer  "Question: ...", a line "Answer:" (the zero-shot form of GSM8K in lm-evaluation-harness)
    boxed            ChatML, and after each problem the line "Please reason step by step, and put your final answer
                     within \boxed{}." (first of the candidates in the authors' utils/chat_template.py)
    qwen-math        ChatML with that sentence as the system message (Qwen2.5-Math-Instruct's tokenizer_config.json;
                     `qwen25-math-cot` in QwenLM/Qwen2.5-Math; `qwen_math` in sail-sg/understand-r1-zero)
    llama-3          headers and <|eot_id|>, no system message of its own (meta-llama/Meta-Llama-3-8B-Instruct's
                     tokenizer_config.json; 3.1 and later add one with dates)
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from gift.cli import UserError, nearest

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

# transformers renders with trim_blocks: a newline right after a block tag is lost, so newlines stand in expressions.
TURN_GAP = r"{% if not loop.first and message.role != 'assistant' %}{{ '\n\n' }}{% endif %}"
CHATML_TURN = r"{{ '<|im_start|>' + message.role + '\n' + message.content }}"
CHATML_END = r"{{ '<|im_end|>\n' }}"
CHATML_REPLY = r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

TEMPLATES = {
    "plain": f"{{% for message in messages %}}{TURN_GAP}{{{{ message.content }}}}{{% endfor %}}",
    "question-answer": (
        f"{{% for message in messages %}}{TURN_GAP}"
        r"{{ {'user': 'Question: ', 'assistant': '\nAnswer:'}.get(message.role, '') + message.content }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"
    ),
    "boxed": (
        f"{{% for message in messages %}}{CHATML_TURN}"
        rf"{{% if message.role == 'user' %}}{{{{ '\n' }}}}{INSTRUCTION}{{% endif %}}"
        f"{CHATML_END}{{% endfor %}}{CHATML_REPLY}"
    ),
    "qwen-math": (
        r"{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n' }}"
        f"{INSTRUCTION}{CHATML_END}{{% endif %}}"
        f"{{% for message in messages %}}{CHATML_TURN}{CHATML_END}{{% endfor %}}{CHATML_REPLY}"
    ),
    "llama-3": (
        r"<|begin_of_text|>{% for message in messages %}"
        r"{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
        r"{% endfor %}{% if add_generation_prompt %}"
        r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}


def apply_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Makes the named template the tokenizer's chat template, with its begin token where it would add one to a text.

    Raises UserError for an unknown name, and where the tokenizer lacks a special token that the template is made of.
    """
    if name not in TEMPLATES:
        raise UserError(
            f"data.template: no template {name!r}{nearest(name, TEMPLATES)}; there are {', '.join(TEMPLATES)}"
        )
    if lacking := missing_tokens(tokenizer, name):
        fitting = ", ".join(other for other in TEMPLATES if not missing_tokens(tokenizer, other))
        raise UserError(
            f"data.template: {name!r} needs the token {lacking[0]!r}, which this tokenizer would split into pieces;"
            f" templates that fit it: {fitting}"
        )
    begin = tokenizer.bos_token
    adds_begin = begin is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    prefix = "{{ bos_token }}" if adds_begin and begin not in TEMPLATES[name] else ""
    tokenizer.chat_template = prefix + TEMPLATES[name]


def missing_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """The special tokens of a template that are not single tokens of the tokenizer."""
    wanted = dict.fromkeys(re.findall(r"<\|\w+\|>", TEMPLATES[name]))
    vocabulary = tokenizer.get_vocab()
    return [token for token in wanted if tokenizer.encode(token, add_special_tokens=False) != [vocabulary.get(token)]]
