# SPDX-License-Identifier: Apache-2.0
"""One vocabulary for several models: which row goes where, the files, and what is refused.

`tests/peers/mergekit_extras_test.py` compares with mergekit.
"""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from treesurgeon.io import remapped, tokenizer_files, vocabulary

BASE, OTHER, THIRD = ("a", "b", "c"), ("b", "x", "a", "y"), ("x", "b", "z")
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


class Raw:
  """Tensors by name, as a source."""

  spec = None

  def __init__(self, words, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    self.tensors = {
      EMBED: rng.normal(size=(len(words), 4)).astype(dtype),
      NORM: np.ones(4, dtype),
    }

  def addresses(self):
    return list(self.tensors)

  def leaf(self, address):
    return self.tensors[address]

  def struct(self, address):
    x = self.tensors[address]
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def write(path, words, added=(), rows=None, kind="BPE", **config):
  """Writes a directory's tokenizer and config."""
  path.mkdir()
  ids = {w: i for i, w in enumerate(words)}
  model = (
    tokenizers.models.BPE(ids, []) if kind == "BPE" else tokenizers.models.WordLevel(ids, words[0])
  )
  inner = tokenizers.Tokenizer(model)
  inner.add_tokens(list(added))
  inner.save(str(path / "tokenizer.json"))
  rows = rows or len(words) + len(added)
  (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
  if config:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
  return path


@pytest.fixture
def models(tmp_path):
  """Three directories and their embeddings."""
  words = {"base": BASE, "other": OTHER, "third": THIRD}
  directories = {name: write(tmp_path / name, w) for name, w in words.items()}
  sources = {name: Raw(w, i) for i, (name, w) in enumerate(words.items())}
  return directories, sources


def row(sources, name, word):
  words = {"base": BASE, "other": OTHER, "third": THIRD}[name]
  return sources[name].tensors[EMBED][words.index(word)]


def test_union_keeps_the_base_and_appends(models):
  directories, _ = models
  plan = vocabulary.plan(directories)
  assert list(plan.ids) == ["a", "b", "c", "x", "y", "z"] and plan.size == 6
  inner = tokenizers.Tokenizer.from_str(plan.files["tokenizer.json"])
  assert inner.get_vocab() == plan.ids


def test_rows_come_from_the_only_donor_the_base_or_the_average(models):
  directories, sources = models
  plan = vocabulary.plan(directories)
  out = {n: m.leaf(EMBED) for n, m in remapped.remap(plan, sources, base="base").items()}
  for word, i in plan.ids.items():
    for name in sources:
      has = [n for n in sources if plan.rows[n][i] >= 0]
      if name in has:
        want = row(sources, name, word)
      elif "base" in has:
        want = row(sources, "base", word)
      else:
        want = np.mean([row(sources, n, word) for n in has], axis=0)
      np.testing.assert_allclose(out[name][i], want, rtol=1e-6)
  # Without a base among the models, what several have is averaged; c is the base's alone.
  out = remapped.remap(plan, sources)["third"].leaf(EMBED)
  average = (row(sources, "base", "a") + row(sources, "other", "a")) / 2
  np.testing.assert_allclose(out[0], average, rtol=1e-6)
  np.testing.assert_array_equal(out[2], row(sources, "base", "c"))


def test_everything_else_passes(models):
  directories, sources = models
  model = remapped.remap(vocabulary.plan(directories), sources)["other"]
  assert model.leaf(NORM) is sources["other"].tensors[NORM] and model.spec is None
  assert model.addresses() == [EMBED, NORM]
  assert model.struct(EMBED).shape == (6, 4) and model.struct(NORM).shape == (4,)


def test_other_vocabularies_than_the_union(models):
  directories, sources = models
  plan = vocabulary.plan(directories, source="base")
  assert list(plan.ids) == list(BASE)
  out = remapped.remap(plan, sources, base="base")["other"].leaf(EMBED)
  np.testing.assert_array_equal(out[2], row(sources, "base", "c"))
  for source in ("third", str(directories["third"])):
    assert list(vocabulary.plan(directories, source=source).ids) == list(THIRD)


def test_a_token_that_no_model_has_is_noted_and_zero(tmp_path, models):
  directories, sources = models
  plan = vocabulary.plan(directories, source=str(write(tmp_path / "more", (*BASE, "q"))))
  assert plan.notes == ("1 tokens such as 'q' are in no model: their rows are zero",)
  assert not remapped.remap(plan, sources)["base"].leaf(EMBED)[3].any()


def test_padding_is_the_mean_row(models):
  directories, sources = models
  plan = vocabulary.plan(directories, pad_to_multiple_of=4)
  assert plan.size == 8
  out = remapped.remap(plan, sources)["base"].leaf(EMBED)
  np.testing.assert_allclose(out[6:], np.stack([out[:6].mean(0)] * 2), rtol=1e-6)


def test_single_tokens_are_overridden(models):
  directories, sources = models
  tokens = {
    "a": {"source": "other", "force": True},
    "x": {"source": {"kind": "zero"}},
    "z": {"source": {"kind": "model_token", "model": "base", "token": "c"}},
    "new": {"source": {"kind": "model_token", "model": "other", "token_id": 3}},
  }
  plan = vocabulary.plan(directories, tokens=tokens)
  assert plan.ids["new"] == 6
  out = {n: m.leaf(EMBED) for n, m in remapped.remap(plan, sources, base="base").items()}
  for name in sources:
    np.testing.assert_array_equal(out[name][0], row(sources, "other", "a"))
    np.testing.assert_array_equal(out[name][6], row(sources, "other", "y"))
  assert not out["base"][plan.ids["x"]].any()  # a lack is filled as said
  np.testing.assert_array_equal(out["other"][plan.ids["x"]], row(sources, "other", "x"))
  np.testing.assert_array_equal(out["base"][plan.ids["z"]], row(sources, "base", "c"))
  np.testing.assert_array_equal(out["third"][plan.ids["z"]], row(sources, "third", "z"))


def test_dtypes(models):
  directories, sources = models
  sources["other"] = Raw(OTHER, 1, ml_dtypes.bfloat16)
  plan = vocabulary.plan(directories)
  wide = remapped.remap(plan, sources)["other"]
  assert wide.leaf(EMBED).dtype == wide.struct(EMBED).dtype == np.float32
  narrow = remapped.remap(plan, sources, dtype="bfloat16")["base"]
  assert narrow.leaf(EMBED).dtype == narrow.struct(EMBED).dtype == ml_dtypes.bfloat16


def test_tokens_without_an_embedding_are_left_out(tmp_path):
  base = write(tmp_path / "base", BASE, added=["<over>"], rows=3)
  other = write(tmp_path / "other", OTHER, added=["<new>", "<past>"], rows=5)
  plan = vocabulary.plan({"base": base, "other": other})
  assert list(plan.ids) == ["a", "b", "c", "x", "y", "<new>"]
  assert plan.rows["other"].tolist() == [2, 0, -1, 1, 3, 4]
  base = write(tmp_path / "words", BASE, added=["<over>"], rows=3, kind="words")
  with pytest.raises(ValueError, match="only a BPE tokenizer can lose them"):
    vocabulary.plan({"base": base})


def test_stripping_leaves_out_the_merges_of_lost_tokens(tmp_path):
  path = write(tmp_path / "m", BASE, rows=4)
  inner = tokenizers.models.BPE(
    {"a": 0, "b": 1, "ab": 2, "aba": 4, "c": 3}, [("a", "b"), ("ab", "a")]
  )
  tokenizers.Tokenizer(inner).save(str(path / "tokenizer.json"))
  out = tokenizer_files.stripped(tokenizer_files.read(path))
  assert out.get_vocab() == {"a": 0, "b": 1, "ab": 2, "c": 3}
  assert out.encode("aba").tokens == ["ab", "a"]


def test_added_tokens_keep_their_settings(tmp_path):
  special = tokenizers.AddedToken("<s>", special=True, rstrip=True)
  base = write(
    tmp_path / "base", BASE, bos_token="<s>", added_tokens_decoder={}, chat_template="{{ old }}"
  )
  (base / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
  other = write(tmp_path / "other", ("a",), added=[special])
  plan = vocabulary.plan({"base": base, "other": other})
  (added,) = json.loads(plan.files["tokenizer.json"])["added_tokens"]
  assert added["content"] == "<s>" and added["special"] and added["rstrip"] and added["id"] == 3
  config = json.loads(plan.files["tokenizer_config.json"])
  assert config["added_tokens_decoder"]["3"]["special"] and config["bos_token"] == "<s>"
  assert plan.files["chat_template.jinja"] == "{{ old }}"
  assert plan.files["special_tokens_map.json"] == '{"bos_token": "<s>"}'


def test_chat_templates(tmp_path):
  texts = ("{{ messages[0] }}", [{"name": "default", "template": "{{ messages[1] }}"}])
  directories = {n: write(tmp_path / n, BASE, chat_template=texts[n != "a"]) for n in "abc"}
  (directories["c"] / "chat_template.jinja").write_text("{{ messages[1] }}\n")
  for template, want in (
    (None, texts[0]),
    ("auto", "{{ messages[1] }}"),
    ("{{ a template of one's own }}", "{{ a template of one's own }}"),
  ):
    files = vocabulary.plan(directories, source="base", chat_template=template).files
    assert files["chat_template.jinja"] == want
    if template:
      assert json.loads(files["tokenizer_config.json"])["chat_template"] == want
  assert (
    "<|im_start|>"
    in vocabulary.plan(directories, chat_template="chatml").files["chat_template.jinja"]
  )
  with pytest.raises(ValueError, match="did you mean 'chatml'"):
    vocabulary.plan(directories, chat_template="chatlm")


def test_a_model_without_a_tokenizer_has_the_base_one(tmp_path, models):
  directories, _ = models
  (tmp_path / "bare").mkdir()
  plan = vocabulary.plan({**directories, "bare": tmp_path / "bare"})
  assert plan.notes == ("bare has no tokenizer.json: taken to have that of base",)
  np.testing.assert_array_equal(plan.rows["bare"], plan.rows["base"])
  with pytest.raises(ValueError, match=r"no tokenizer\.json; a tokenizer is made from the base's"):
    vocabulary.plan({"bare": tmp_path / "bare", **directories})


BAD = {
  "source": ({"source": "nowhere"}, "valid are union, base, or a model: base, other, third"),
  "pad": ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be an integer of 1"),
  "token": ({"tokens": {"a": "other"}}, "must be a mapping with source, force"),
  "key": ({"tokens": {"a": {"source": "other", "forced": True}}}, "unknown key 'forced'"),
  "force": ({"tokens": {"a": {"source": "other", "force": 1}}}, "must be true or false"),
  "model": ({"tokens": {"a": {"source": "othr"}}}, "'othr' is not a model of this merge: base"),
  "none": ({"tokens": {"a": {"force": True}}}, "must be a mapping with kind, model"),
  "kind": ({"tokens": {"a": {"source": {"kind": "one"}}}}, "valid: zero, model_token"),
  "which": (
    {"tokens": {"a": {"source": {"kind": "model_token", "model": "base"}}}},
    "either token or token_id",
  ),
  "word": (
    {"tokens": {"a": {"source": {"kind": "model_token", "model": "base", "token": "q"}}}},
    "base has no token 'q'",
  ),
  "id": (
    {"tokens": {"a": {"source": {"kind": "model_token", "model": "base", "token_id": -1}}}},
    "integer of 0 or more",
  ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD.keys())
def test_refuses(models, given, message):
  with pytest.raises(ValueError, match=message):
    vocabulary.plan(models[0], **given)


def test_refuses_rows_that_are_not_there(models):
  directories, sources = models
  tokens = {"new": {"source": {"kind": "model_token", "model": "base", "token_id": 9}}}
  plan = vocabulary.plan(directories, tokens=tokens)
  with pytest.raises(ValueError, match=f"base: {EMBED} has 3 rows; row 9"):
    remapped.remap(plan, sources)["base"].leaf(EMBED)
  del sources["base"]
  with pytest.raises(ValueError, match="'base', which is not merged here; merged are other, third"):
    remapped.remap(plan, sources)["other"].leaf(EMBED)
  plan = vocabulary.plan(directories, tokens={"z": {"source": "other", "force": True}})
  with pytest.raises(ValueError, match="'other' has no such token"):
    remapped.remap(plan, sources)["other"].leaf(EMBED)
  sources["third"].tensors[EMBED] = np.zeros((3, 5), np.float32)
  with pytest.raises(ValueError, match="only the number of tokens may differ"):
    remapped.remap(vocabulary.plan(directories), sources)["other"].leaf(EMBED)
