"""Per-token statistics of the LM head, and losses made of them: the only code that touches [tokens, vocab] matrices.

Every objective of this suite is a function of a few numbers per token (`VocabStats`). Two ways lead to them; what
either holds of the [tokens, vocab] logits at a time is bounded in bytes, however many tokens there are:

    vocab_stats   returns the numbers, differentiable; the backward pass computes every tile of logits, some tokens by
                  some of the vocabulary, a second time. For losses whose tokens depend on each other, as in RL, and for
                  measurements.
    vocab_loss    sums an objective over tokens and forms all gradients during the forward pass, while the logits of a
                  chunk of tokens, [chunk, V], are there: a third fewer matrix products. For objectives that treat every
                  token on its own, as in stage 1.

With logits z, pi = softmax(z), reference p = softmax(z_ref), label y and upstream gradients g, one tile's gradient is

    dz = g_logp (onehot(y) - pi) - g_entropy pi (log pi + H(pi)) + g_mean_logp (1/V - pi) + g_ref_ce (pi - p)

Numerical policy. Logits, softmax and every sum over tokens or vocabulary are float32 (float64 for float64 inputs),
whatever the inputs' dtype. Gradients are cast to that once the sum over all tiles of a call is complete; `vocab_loss`
multiplies them by the upstream gradient after the cast, so those of bfloat16 inputs are rounded twice per micro-batch.
Rounding each tile's share of a weight gradient before summing would bias training. On CUDA, half-precision operands
enter the matrix products as they are, with float32 results; dz is rounded to their dtype there, as in an ordinary
half-precision backward pass.

Logits are softcap(scale * (hidden @ weight.T + bias)) / temperature with softcap(z) = c tanh(z / c): what Cohere and
Granite (scale) and Gemma 2 (softcap) do after the LM head. Both models' logits are treated alike.

Masked vocabulary. A bias of -inf takes an entry out of the vocabulary: its probability is 0 and 0 * (-inf) counts as 0.
`mean_logp` is the mean over the entries that remain. Where a definition is infinite its value is: logp = -inf for a
masked label, ref_ce = +inf if the student masks an entry that the reference does not (of a `SparseReference`, whose
masked entries cost 1e30 nats each, it is huge but finite). No value or gradient is NaN.
"""

from gift.vocab.head import DenseReference, SparseReference, VocabStats
from gift.vocab.loss import vocab_loss
from gift.vocab.stats import vocab_stats

__all__ = ["DenseReference", "SparseReference", "VocabStats", "vocab_loss", "vocab_stats"]
