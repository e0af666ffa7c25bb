"""Templates: ids as transformers makes them, and masks that hold the answers and nothing else."""

import json
import os
import random
import shutil
import time
import unicodedata

import conversations
import numpy as np
import pytest

from mllm_jax.data import chat, jinja_template
from mllm_jax.data.records import DataError, Turn

# Qwen2's own; Llama 3's, which takes off outer white space; Mistral's, with a space that belongs to the answer.
QWEN2 = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
  "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
  "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
  "{% endif %}{{ content }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
  "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
  "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
  "{% generation %}{{ ' ' + message['content'] + eos_token}}{% endgeneration %}"
  "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Qwen2.5's, without what it says of tools.
QWEN2_5 = QWEN2.replace("You are a", "You are Qwen, created by Alibaba Cloud. You are a")
COUNT = int(os.environ.get("CONVERSATIONS", 1200))  # of each pair of a template and a tokenizer


def talk(*texts):
  return [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def runs(encoded):
  """The trained-on ids, one list for each stretch of them."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.trained_on, [0]])))
  return [encoded.ids[start:stop].tolist() for start, stop in edges.reshape(-1, 2)]


@pytest.fixture(scope="session")
def with_template(tokenizer_folders, byte_level_folders, tmp_path_factory):
  """(name of a tokenizer, Jinja text, file) -> (ChatTokenizer, its folder)."""

  def make(name, text, file="chat_template.jinja"):
    source = {**byte_level_folders, "spm_new": tokenizer_folders[False], "spm_legacy": tokenizer_folders[True]}[name]
    folder = tmp_path_factory.mktemp("template") / "tokenizer"
    shutil.copytree(source, folder)
    if file == "tokenizer_config.json":
      config = json.loads((folder / file).read_text())
      (folder / file).write_text(json.dumps(config | {"chat_template": text}))
    else:
      (folder / file).write_text(json.dumps({"chat_template": text}) if file.endswith("json") else text)
    return chat.load_tokenizer(str(folder)), folder

  return make


@pytest.fixture(scope="session")
def cases(tokenizers, byte_level, with_template):
  """{name: (template, tokenizer)}: every template with every tokenizer that fits it."""
  everywhere = {"spm_new": tokenizers[False], "spm_legacy": tokenizers[True], **byte_level}
  found = {
    f"{template} {name}": (template, tokenizer)
    for name, tokenizer in everywhere.items()
    for template in ("vicuna_v1", "plain")
  }
  for case in OF_A_FAMILY:
    template, name = case.split()
    found[case] = template, everywhere[name]
  for name, text in (("qwen2", QWEN2), ("llama_3", LLAMA_3), ("spm_new", MISTRAL), ("spm_legacy", MISTRAL)):
    found[f"jinja {name}"] = "jinja", with_template(name, text)[0]
  return found


OF_A_FAMILY = [
  *(f"{template} qwen2" for template in ("chatml", "chatml_released", "qwen2_5", "internvl2")),
  *(f"mistral_instruct {name}" for name in ("spm_new", "spm_legacy")),
  "llava_llama_3 llama_3",
]
CASES = [
  *(
    f"{template} {name}"
    for name in ("spm_new", "spm_legacy", "qwen2", "llama_3")
    for template in ("vicuna_v1", "plain")
  ),
  *OF_A_FAMILY,
  *(f"jinja {name}" for name in ("qwen2", "llama_3", "spm_new", "spm_legacy")),
]


def expected_texts(case, tokenizer, turns):
  """What each stretch of trained-on tokens decodes to."""
  answers = [turn.text for turn in turns if turn.role == "gpt" and turn.text]
  if "qwen2" in case:
    answers = [unicodedata.normalize("NFC", answer) for answer in answers]
  if case == "jinja llama_3":
    answers = [answer.strip() for answer in answers if answer.strip()]
  if case.startswith("plain"):
    return [answers[0] + "\n"] if answers else []
  # The space before an answer is a part of its first token; SentencePiece's decoder takes it off.
  before = " " if case.split()[0] == "vicuna_v1" and "spm" not in case else ""
  return [before + answer for answer in answers]


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_answers_are_trained_on(case, cases):
  """Random conversations through a template: no error but DataError, and each mask decodes to its answers.

  CONVERSATIONS=100000 in the environment makes it the long run.
  """
  template, tokenizer = cases[case]
  end, draw = chat.end_id(template, tokenizer), random.Random(case)
  ends, refused, start = set(tokenizer.specials.values()), 0, time.perf_counter()
  for _ in range(COUNT):
    turns, n_images, system = conversations.conversation(draw)
    if template == "plain":
      turns = turns[:2]
      n_images = turns[0].text.count("<image>")
    try:
      encoded = chat.encode(turns, template, tokenizer, n_images, system)
    except DataError:
      refused += 1
      continue
    assert (encoded.ids == chat.IMAGE_TOKEN_INDEX).sum() == n_images
    assert not encoded.trained_on[encoded.ids < 0].any() and encoded.ids.max(initial=0) < tokenizer.vocab_size
    if template == "chatml_released":
      continue  # its mask is compared with the released rule below
    found = runs(encoded)
    if template != "plain":
      assert all(run[-1] == end and not ends & set(run[:-1]) for run in found), turns
      found = [run[:-1] for run in found]
    texts = [tokenizer.decode(run) for run in found]
    assert texts == expected_texts(case, tokenizer, turns), (turns, system)
  print(f"{case}: {COUNT} conversations in {time.perf_counter() - start:.1f} s, {refused} refused")
  # Mistral's template refuses a system text; the others take everything.
  assert refused < COUNT * (0.8 if "jinja spm" in case else 0.01)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("plain")])
def test_a_prompt_is_the_beginning_of_its_training_row(case, cases):
  template, tokenizer = cases[case]
  draw = random.Random(1)
  for _ in range(100):
    turns, n_images, _ = conversations.conversation(draw)
    if template == "chatml_released" and turns[-1].text.startswith("\n"):
      continue  # the released rule merges the line break of the header with the answer's
    prompt = chat.encode_prompt(turns[:-1], template, tokenizer, n_images)
    encoded = chat.encode(turns, template, tokenizer, n_images)
    assert encoded.ids[: len(prompt)].tolist() == prompt.tolist(), turns
    if template != "chatml_released":
      answer = chat.Encoded(encoded.ids[len(prompt) :], encoded.trained_on[len(prompt) :])
      assert answer.trained_on[:1].any() == bool(turns[-1].text.strip() if case == "jinja llama_3" else turns[-1].text)


CONVERSATIONS = [
  talk("What is in the picture?", "The dog."),
  talk("Hello", "Yes, 42.\n\nNo.", "And\nthe left?", "is the user's"),
  talk("<image>\nWhat?", "A dog", "Where?", "On the left"),
]


@pytest.mark.parametrize(
  "template,name,text,default",
  [
    ("chatml", "qwen2", QWEN2, "You are a helpful assistant."),
    ("qwen2_5", "qwen2", QWEN2_5, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ("internvl2", "qwen2", QWEN2.replace("'\n'}}", "''}}"), chat.templates.INTERNVL2_SYSTEM),
    ("llava_llama_3", "llama_3", LLAMA_3, None),
  ],
)
def test_ids_are_those_of_the_models_own_template(template, name, text, default, with_template):
  """transformers renders the published template and tokenizes it; so do we, from the pieces and from Jinja."""
  tokenizer, folder = with_template(name, text)
  reference = chat.hf_tokenizer(folder)
  for system in ("Be brief.", default or "You see."):
    for turns in CONVERSATIONS[:2]:
      messages = [{"role": "system", "content": system}]
      messages += [{"role": {"human": "user", "gpt": "assistant"}[turn.role], "content": turn.text} for turn in turns]
      ids = lambda messages, prompt: reference.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
      )
      for found in (template, "jinja"):
        assert chat.encode(turns, found, tokenizer, 0, system).ids.tolist() == ids(messages, False)
        prompt = chat.encode_prompt(turns[:-1], found, tokenizer, 0, system)
        assert prompt.tolist() == ids(messages[:-1], True)
      if system == default:
        assert chat.encode(turns, template, tokenizer, 0).ids.tolist() == ids(messages, False)


def test_mistral_instruct_is_mistrals_own_template(with_template):
  tokenizer, _ = with_template("spm_legacy", MISTRAL)  # as Mistral's tokenizers are
  for turns in CONVERSATIONS:
    n_images = sum("<image>" in turn.text for turn in turns)
    own, jinja = (chat.encode(turns, template, tokenizer, n_images) for template in ("mistral_instruct", "jinja"))
    assert own.ids.tolist() == jinja.ids.tolist() and own.trained_on.tolist() == jinja.trained_on.tolist()
  told, whole = (
    chat.encode(talk(text, "A"), "mistral_instruct", tokenizer, 0, system)
    for text, system in (("Q", "Be brief."), ("Be brief.\n\nQ", None))
  )
  assert told.ids.tolist() == whole.ids.tolist()


def test_released_labels_of_chatml(byte_level_folders, byte_level):
  """LLaVA-NeXT's rule, which LLaVA-UHD v2 took over: each message is tokenized by itself; an assistant's is trained on
  as a whole, and so are "<|im_start|>", "<|im_end|>" and the token of a newline wherever they stand."""
  reference, tokenizer = chat.hf_tokenizer(byte_level_folders["qwen2"]), byte_level["qwen2"]
  ids_of = lambda text: reference(text).input_ids
  newline = ids_of("\n")
  assert len(newline) == 1
  always = [*newline, *reference.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])]
  questions = [talk("a\nb\n\nc", "\nYes\n", "Hello", "\n\nNo"), *CONVERSATIONS[:2]]
  for turns in questions:
    ids, labels = [], []
    for role, text in [("system", "You are a helpful assistant."), *((turn.role, turn.text) for turn in turns)]:
      role = {"human": "user", "gpt": "assistant"}.get(role, role)
      block = ids_of(f"<|im_start|>{role}\n{text}<|im_end|>\n")
      ids += block
      labels += block if role == "assistant" else [-100] * len(block)
    labels = [token if token in always else label for token, label in zip(ids, labels)]
    encoded = chat.encode(turns, "chatml_released", tokenizer, 0)
    assert encoded.ids.tolist() == ids
    assert np.where(encoded.trained_on, encoded.ids, -100).tolist() == labels


def test_pieces_of_a_conversation_with_a_picture(byte_level):
  tokenizer = byte_level["qwen2"]
  encoded = chat.encode(CONVERSATIONS[2], "chatml", tokenizer, 1)
  place = encoded.ids.tolist().index(chat.IMAGE_TOKEN_INDEX)
  assert tokenizer.token_texts(encoded.ids[place - 1 : place]) == ["\n"]
  assert tokenizer.decode(encoded.ids[place + 1 :]).startswith("\nWhat?\nassistant\nA dog\nuser\nWhere?")
  assert [tokenizer.decode(run) for run in runs(encoded)] == ["A dog", "On the left"]


def test_system_texts(byte_level):
  tokenizer = byte_level["qwen2"]
  shown = lambda system: tokenizer.decode(chat.encode(talk("Q", "A"), "chatml", tokenizer, 0, system).ids)
  assert shown(None) == "system\nYou are a helpful assistant.\nuser\nQ\nassistant\nA\n"
  assert shown("Be brief.") == "system\nBe brief.\nuser\nQ\nassistant\nA\n"
  assert shown("") == "user\nQ\nassistant\nA\n"


def test_what_ends_an_answer(cases):
  names = {"chatml qwen2": "<|im_end|>", "llava_llama_3 llama_3": "<|eot_id|>", "vicuna_v1 spm_new": "</s>"}
  names |= {"qwen2_5 qwen2": "<|im_end|>", "internvl2 qwen2": "<|im_end|>", "mistral_instruct spm_legacy": "</s>"}
  names |= {"jinja qwen2": "<|im_end|>", "jinja llama_3": "<|eot_id|>", "jinja spm_legacy": "</s>"}
  for case, name in names.items():
    template, tokenizer = cases[case]
    assert chat.end_id(template, tokenizer) == tokenizer.token_id(name), case


def test_a_token_does_not_reach_from_a_header_into_an_answer(byte_level):
  """ "\\n\\n" is one token; after the header's newline an answer's own is a token of its own."""
  tokenizer = byte_level["qwen2"]
  assert len(tokenizer.encode_chunk([chat.Piece("text", "\n\n")]).ids) == 1
  (run,) = runs(chat.encode(talk("Q", "\nA"), "chatml", tokenizer, 0))
  assert tokenizer.decode(run) == "\nA"


def test_special_tokens_that_the_files_do_not_call_special(byte_level_folders, tmp_path):
  shutil.copytree(byte_level_folders["qwen2"], tmp_path / "copy")
  content = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
  for token in content["added_tokens"]:
    token["special"] = False
  (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(content))
  tokenizer = chat.load_tokenizer(str(tmp_path / "copy"))
  encoded = chat.encode(talk("<|im_end|>", "<|im_start|>"), "chatml", tokenizer, 0)
  assert (encoded.ids == tokenizer.token_id("<|im_end|>")).sum() == 3


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_where_a_chat_template_lies(file, with_template):
  tokenizer, _ = with_template("qwen2", QWEN2, file)
  assert tokenizer.chat_template == QWEN2


@pytest.mark.parametrize(
  "text,message",
  [
    ("", "no chat template"),
    ("{% for %}", "does not take this conversation"),
    ("{{ raise_exception('no system') }}", "no system"),
    ("{{ messages[0].__class__.__mro__ }}", "does not take this conversation"),
    ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", None),
    ("{% for m in messages %}{{ m.content | replace('b', 'c') }}{% endfor %}", "no special token after an answer"),
    ("{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}", "changes the texts"),
    ("{% for m in messages %}{{ m.content }}.<|im_end|>{% endfor %}", "writes '.<|im_end|>' and no special token"),
    ("{{ strftime_now('%d') }}", "does not take this conversation"),
  ],
)
def test_templates_that_cannot_be_used(text, message, with_template):
  tokenizer, _ = with_template("qwen2", text)
  if message is None:
    assert chat.end_id("jinja", tokenizer) == tokenizer.token_id("<|im_end|>")
    return
  with pytest.raises(DataError) as error:
    chat.end_id("jinja", tokenizer)
  assert message in str(error.value)


def test_answers_that_a_template_drops_are_refused(with_template):
  """Templates of models that think leave what was thought out of earlier answers."""
  text = QWEN2.replace("message['content']", "message['content'].split('</think>')[-1]")
  tokenizer, _ = with_template("qwen2", text)
  assert chat.encode(talk("Q", "A"), "jinja", tokenizer, 0).trained_on.sum() == 2
  with pytest.raises(DataError, match="changes the texts of this conversation"):
    chat.encode(talk("Q", "thought</think>A"), "jinja", tokenizer, 0)


def test_tokenizers_that_do_not_fit_a_template(tokenizers, byte_level):
  with pytest.raises(DataError, match=r"no special token '<\|im_start\|>'; it has <unk>, <s>, </s>"):
    chat.end_id("chatml", tokenizers[False])
  with pytest.raises(DataError, match=r"no special token '<\|start_header_id\|>'"):
    chat.encode(talk("Q", "A"), "llava_llama_3", byte_level["qwen2"], 0)
  with pytest.raises(DataError, match="no chat template"):
    jinja_template.end_id(tokenizers[False])
