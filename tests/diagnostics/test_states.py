import pytest
import torch
from tiny_models import KINDS, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from diagnostics import distribution, states
from diagnostics.states import collect
from gift.batches import Encoded
from gift.cli import UserError
from gift.models import lm_head

VOCABULARY = 50


def model_of(kind="qwen2", seed=0, **settings):
    return tiny_model(VOCABULARY, kind, seed, initializer_range=0.3, **settings)


def sequences(seed=0, lengths=((3, 5), (7, 1), (1, 9), (4, 4), (2, 2))):
    """Encoded sequences of (prompt, response) lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(
            f"s{index}", tuple(torch.randint(VOCABULARY, (prompt + response,), generator=generator).tolist()), prompt
        )
        for index, (prompt, response) in enumerate(lengths)
    ]


@torch.no_grad()
def one_by_one(model, encoded):
    """Each sequence alone and unpadded through the whole model: its last hidden states and logits before each token."""
    outputs = [model(torch.tensor([example.ids]), output_hidden_states=True) for example in encoded]
    rows = [slice(example.prompt_length - 1, len(example.ids) - 1) for example in encoded]
    hidden = torch.cat([output.hidden_states[-1][0, row] for output, row in zip(outputs, rows, strict=True)])
    logits = torch.cat([output.logits[0, row] for output, row in zip(outputs, rows, strict=True)])
    return hidden, logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_states_are_those_of_each_sequence_alone(kind, tied, batch_size):
    model, encoded = model_of(kind, tie_word_embeddings=tied), sequences()
    found = collect(model, encoded, batch_size=batch_size)
    hidden, logits = one_by_one(model, encoded)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-4, atol=1e-5)
    weight, bias = lm_head(model)
    assert bias is None
    torch.testing.assert_close(found.hidden @ weight.T, logits, rtol=1e-4, atol=1e-4)
    assert found.labels.tolist() == [token for example in encoded for token in example.ids[example.prompt_length :]]
    assert found.sequence.tolist() == [0] * 5 + [1] + [2] * 9 + [3] * 4 + [4] * 2
    assert found.ids == ["s0", "s1", "s2", "s3", "s4"]


def test_surprisal_of_the_labels_is_the_models_own_loss():
    model, (encoded, *_) = model_of(), sequences()
    found = collect(model, [encoded], batch_size=1)
    weight, _ = lm_head(model)
    measured = distribution.compare(found.hidden, weight, found.hidden, weight, found.labels)
    labels = torch.tensor([encoded.ids])
    labels[:, : encoded.prompt_length] = -100
    loss = model(torch.tensor([encoded.ids]), labels=labels).loss
    assert measured["nll_a"].mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_same_model_twice_gives_the_same_states():
    encoded = sequences()
    first, second = (collect(model_of(), encoded, batch_size=2) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)


def test_states_keep_the_models_dtype_and_no_logits_are_made(monkeypatch):
    model = model_of().bfloat16()
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the LM head ran"))
    found = collect(model, sequences(), batch_size=2)
    assert found.hidden.dtype == torch.bfloat16
    assert found.hidden.device.type == "cpu"
    assert not found.hidden.requires_grad


def test_a_damaged_model_is_named_by_the_sequence_it_fails_on():
    model = model_of()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    encoded = [Encoded("fine", (1, 2, 3), 1), Encoded("broken", (1, 7, 3), 1)]
    with pytest.raises(UserError, match="broken: the model's states are not finite"):
        collect(model, encoded, batch_size=1)


def test_batch_size_must_be_positive():
    with pytest.raises(UserError, match="batch size is 0"):
        collect(model_of(), sequences(), batch_size=0)


def word_tokenizer(words="<pad> <end> one two three"):
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words.split())}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template="{{ messages[0]['content'] }}"
    )


def test_equal_tokenizers_do_not_differ():
    assert states.tokenizer_difference(word_tokenizer(), word_tokenizer()) is None


def test_what_differs_between_tokenizers_is_named():
    a, b = word_tokenizer(), word_tokenizer()
    b.chat_template = a.chat_template + " "
    assert states.tokenizer_difference(a, b) == "the chat templates are not the same text"
    b.chat_template = a.chat_template
    b.eos_token = "three"
    assert states.tokenizer_difference(a, b) == "the end token is 'three' instead of '<end>'"
    swapped = word_tokenizer("<pad> <end> one three two")
    assert states.tokenizer_difference(a, swapped) == "token 'three' has id 3 instead of 4"
    longer = word_tokenizer("<pad> <end> one two three four")
    assert states.tokenizer_difference(a, longer) == "token 'four' has id 5 instead of None"
