# SPDX-License-Identifier: Apache-2.0
"""Requests: CounterFact's records, places of subjects under several tokenizers, mistakes."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from treesurgeon.edit import requests, tokens
from treesurgeon.io import tokenizer as io_tokenizer

RECORD = {
  "case_id": 7,
  "requested_rewrite": {
    "prompt": "The mother tongue of {} is",
    "subject": "Danielle Darrieux",
    "target_new": {"str": "English", "id": "Q1"},
    "target_true": {"str": "French", "id": "Q2"},
    "relation_id": "P103",
  },
  "paraphrase_prompts": ["Danielle Darrieux spoke"],
  "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
  "other_prompts": [{"prompt": "Danielle Darrieux was a", "answer": "actress"}],
}
TEXT = [
  "The mother tongue of Danielle Darrieux is French . English Léon Blum spoke was a actress",
  "the mother tongue of Danielle is a",
] * 20


def words():
  vocabulary = {w: i for i, w in enumerate(["[UNK]", *sorted(set(" ".join(TEXT).split()))])}
  made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return made


def byte_level():
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    special_tokens=["<s>"],
  )  # fmt: skip
  made.train_from_iterator(TEXT, trainer)
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
  )
  return made


@pytest.fixture(params=["words", "byte_level", "metaspace", "bytes"])
def tokenizer(request):
  if request.param == "bytes":
    return io_tokenizer.ByteTokenizer()
  made = byte_level() if request.param != "words" else words()
  if request.param == "metaspace":
    made.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
      TEXT, trainers.BpeTrainer(vocab_size=80, show_progress=False, special_tokens=["<s>"])
    )
  return made


def test_counterfact_records_are_read():
  r = requests.from_record(RECORD)
  assert r.text == "The mother tongue of Danielle Darrieux is"
  assert (r.target_new, r.target_true) == ("English", "French")
  assert r.paraphrases == ("Danielle Darrieux spoke",)
  assert r.neighbours == ("The mother tongue of Léon Blum is",)
  assert r.others == (("Danielle Darrieux was a", "actress"),)
  assert r.essence == ("{} is a",)


def test_the_subject_ends_where_its_last_character_is(tokenizer):
  made = requests.tokenize(requests.from_record(RECORD), tokenizer, separator=".")
  inner = getattr(tokenizer, "inner", tokenizer)

  def text(ids):
    raw = inner.decode(list(ids))
    return raw.replace("▁", " ")

  upto = text(made.prompt.ids[: made.prompt.subject + 1])
  assert upto.rstrip().endswith("Darrieux")
  before = text(made.prompt.ids[: made.prompt.first])
  assert "Danielle" not in before
  assert before.rstrip().endswith("of")
  assert text(made.new).strip() == "English"
  essence = made.essence[0]
  assert text(essence.ids[essence.first : essence.subject + 1]).strip() == "Danielle Darrieux"


def test_a_beginning_of_sequence_token_leads():
  made = requests.tokenize(requests.from_record(RECORD), byte_level())
  assert made.lead == (byte_level().token_to_id("<s>"),)
  assert made.prompt.ids[0] != made.lead[0]
  assert requests.tokenize(requests.from_record(RECORD), words()).lead == ()


def test_statements_have_one_shape_and_shifted_labels():
  rows = [(tokens.Prompt((5, 6, 7), 1, 1), (8, 9)), (tokens.Prompt((5,), 0, 0), ())]
  made = tokens.statements(rows, before=(1,), length=6)
  assert made.ids.tolist() == [[1, 5, 6, 7, 8, 0], [1, 5, 0, 0, 0, 0]]
  assert made.labels.tolist() == [[-1, -1, -1, 8, 9, -1], [-1] * 6]
  assert made.subject.tolist() == [2, 1]
  assert made.last.tolist() == [3, 1]
  with pytest.raises(ValueError, match="a statement of 5 tokens does not fit into 4"):
    tokens.statements(rows, before=(1,), length=4)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompt": "no place for it"}, r"must hold '\{\}' once"),
    ({"prompt": "{} and {}"}, r"must hold '\{\}' once"),
    ({"subject": " "}, "has an empty subject"),
    ({"target_new": ""}, "has an empty target_new"),
    ({"target_new": "Klingon"}, "'Klingon' in .* is not in the vocabulary"),
    ({"subject": "Worf"}, "'Worf' in .* is not in the vocabulary"),
    ({"target_new": "English Klingon"}, "'Klingon' in .* is not in the vocabulary"),
  ],
)
def test_mistakes_are_named_with_the_file_and_the_record(tmp_path, change, message):
  bad = {**RECORD["requested_rewrite"], **change}
  path = tmp_path / "edits.json"
  path.write_text(json.dumps([RECORD, {**RECORD, "requested_rewrite": bad}]))
  with pytest.raises(ValueError, match=rf"edits\.json: request 1: .*{message}"):
    requests.read(path, words())


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "are not JSON"),
    ("{}", "must be a JSON list, not dict"),
    ("[3]", "request 0: a request must be an object, not int"),
    ('[{"subject": "x"}]', "request 0: lacks 'prompt'"),
  ],
)
def test_files_that_hold_no_requests_are_refused(tmp_path, text, message):
  path = tmp_path / "edits.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    requests.read(path, words())


def test_good_files_are_read(tmp_path):
  path = tmp_path / "edits.json"
  path.write_text(json.dumps([RECORD]))
  (made,) = requests.read(path, words())
  assert made.label == "The mother tongue of Danielle Darrieux is -> English"
