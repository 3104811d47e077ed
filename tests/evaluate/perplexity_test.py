# SPDX-License-Identifier: Apache-2.0
import math

import jax
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import perplexity
from treesurgeon.train import tokenizer as tokenizers

SPEC = models.Spec(vocab_size=300, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=16)
LOGITS = jax.jit(lambda params, tokens: models.forward(SPEC, params, tokens).logits)
TEXT = "Ein Übermaß an Wörtern — 日本 — macht den Satz nicht besser. " * 3


@pytest.fixture(scope="module")
def model():
  params = models.init(SPEC, jax.random.key(0))
  return model_lib.Model(SPEC, jax.tree.map(lambda x: 4 * x, params))


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train([TEXT], vocab_size=300)


def nll_of(model, context, target):
  """Scores one token after one context, log-softmax in float64."""
  padded = np.pad(np.asarray(context), (0, SPEC.max_positions - len(context)))
  x = np.asarray(LOGITS(model.params, padded[None, :])[0, len(context) - 1], np.float64)
  return np.log(np.exp(x - x.max()).sum()) + x.max() - x[target]


def brute_force(model, ids, window, stride):
  """Scores each token once by a forward pass of its own."""
  total, start = 0.0, 0
  for t in range(1, len(ids)):
    while t >= start + window:
      start += stride
    begin = min(start, t - 1)
    total += nll_of(model, ids[begin:t], ids[t])
  return total


def test_equals_the_plain_loss_when_the_text_fits(model):
  ids = np.array([5, 17, 3, 200, 299, 0, 1])
  logits = np.asarray(models.forward(SPEC, model.params, ids[None, :]).logits[0, :-1], np.float64)
  logits -= logits.max(-1, keepdims=True)
  want = (np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), ids[1:]]).mean()
  got = perplexity.evaluate(model, [ids])
  assert got.nll == pytest.approx(want, rel=1e-6)
  assert got.perplexity == pytest.approx(math.exp(want), rel=1e-6)
  assert got.tokens == 6 and got.bits_per_byte is None
  assert got.to_json().keys() == {"nll", "perplexity", "bits_per_byte", "tokens"}


@pytest.mark.parametrize(("window", "stride"), [(6, 2), (6, 5), (6, 1), (4, 3)])
def test_sliding_window_equals_brute_force(model, window, stride):
  rng = np.random.default_rng(0)
  documents = [rng.integers(0, 300, n) for n in (13, 2, 6, 1)]
  got = perplexity.evaluate(model, documents, window=window, stride=stride, batch=3)
  for ids, (total, count) in zip(documents, got.documents, strict=True):
    assert count == len(ids) - 1
    assert total == pytest.approx(brute_force(model, ids, window, stride), rel=1e-5)
  assert got.tokens == sum(len(d) - 1 for d in documents)
  assert got.nll == pytest.approx(sum(t for t, _ in got.documents) / got.tokens)


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize(("window", "stride"), [(4, 2), (4, 4), (5, 1), (2, 2), (3, 2)])
def test_every_token_is_predicted_once_with_enough_context(length, window, stride):
  seen = []
  for start, first, stop in perplexity.windows(length, window=window, stride=stride):
    assert 0 <= start < first < stop <= length and stop - start <= window
    seen += range(first, stop)
    assert first - start >= max(1, window - stride) or start == 0
  assert seen == list(range(1, length))


def test_bits_per_byte_counts_the_bytes_of_what_is_predicted(model, tokenizer):
  ids = tokenizer.encode(TEXT).ids
  got = perplexity.evaluate(model, TEXT, tokenizer, window=16, stride=4)
  by_tokens = perplexity.evaluate(model, [ids], window=16, stride=4)
  size = len(TEXT.encode()) - len(tokenizer.id_to_token(ids[0]))
  assert got.nll == pytest.approx(by_tokens.nll)
  assert got.bits_per_byte == pytest.approx(got.nll * got.tokens / math.log(2) / size)


def test_first_bytes_is_exact_within_a_character(tokenizer):
  text = "語x"
  ids = tokenizer.encode(text).ids
  assert len(ids) > 2  # the character is several byte tokens
  assert perplexity.first_bytes(text, ids, tokenizer) == 1


def test_first_bytes_by_offsets():
  class Encoding:
    offsets = ((0, 1), (1, 2))

  class Words:
    def encode_batch(self, texts, add_special_tokens): ...

    def encode(self, text, add_special_tokens):
      return Encoding()

  assert perplexity.first_bytes("éa", [3, 4], Words()) == 2


def test_documents_do_not_see_each_other(model):
  a, b = [1, 2, 3, 4], [9, 8, 7]
  both = perplexity.evaluate(model, [a, b])
  alone = perplexity.evaluate(model, [b])
  assert both.documents[1][0] == pytest.approx(alone.documents[0][0], rel=1e-6)


def test_compressed_leaves_give_the_loss_of_their_dense_values(model):
  key = jax.random.key(1)
  name = "layers/0/mlp/down/kernel"
  low = leaves.LowRank(jax.random.normal(key, (12, 2)), jax.random.normal(key, (2, 8)))
  packed, dense = model.update({name: low}), model.update({name: leaves.dense(low)})
  ids = [[1, 2, 3, 4, 5, 6]]
  assert perplexity.evaluate(packed, ids).nll == pytest.approx(
    perplexity.evaluate(dense, ids).nll, rel=1e-5
  )


def test_does_not_recompile_for_other_texts(model):
  score = perplexity._scorer(SPEC, None)
  perplexity.evaluate(model, [[1, 2, 3]], window=8, batch=2)
  before = score._cache_size()
  perplexity.evaluate(model, [list(range(40)), [5, 6]], window=8, batch=2)
  assert score._cache_size() == before


@pytest.mark.parametrize(
  ("text", "options", "message"),
  [
    ("", {}, "text is empty"),
    ([[]], {}, "text is empty"),
    ([], {}, "text is empty"),
    ([[4]], {}, "no document has 2 tokens"),
    ([[1, 300]], {}, r"document 0 holds token id 300; the vocabulary is 0 to 299"),
    ([[1, -2]], {}, r"token id -2"),
    ([[1, 2]], {"window": 17}, r"window=17 must lie between 2 and the model's context of 16"),
    ([[1, 2]], {"window": 4, "stride": 5}, r"stride=5 must lie between 1 and window=4"),
    (["a", [1, 2]], {}, "all texts or all token ids"),
  ],
)
def test_bad_input_is_named(model, tokenizer, text, options, message):
  with pytest.raises(ValueError, match=message):
    perplexity.evaluate(model, text, tokenizer, **options)


def test_a_text_needs_a_tokenizer(model):
  with pytest.raises(ValueError, match="needs a tokenizer"):
    perplexity.evaluate(model, "abc")


def test_an_encoder_has_no_next_token(model):
  spec = models.Spec(
    vocab_size=9, d_model=4, num_layers=1, num_heads=1, d_ff=4, kind="encoder", mlm_head=True
  )
  with pytest.raises(ValueError, match="this model is an encoder"):
    perplexity.evaluate(model.replace(spec=spec), [[1, 2]])
