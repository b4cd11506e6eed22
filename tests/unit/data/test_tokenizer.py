"""The torch-free tokenizer against transformers' AutoTokenizer on the same folders, and its errors."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from megatron_rlvr.data.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BUSY = """
{%- if messages[0].role == 'system' %}
    {{- bos_token + messages[0].content | trim }}
{%- else %}
    {{- bos_token }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content }}{%- endgeneration %}
    {%- elif message.role == 'user' %}
        {{- '[' + (message | tojson) + ']' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '>' }}{%- endif %}
"""
CONVERSATION = [
    {"role": "system", "content": " be short "},
    {"role": "user", "content": "is 2 < 3 & é?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
]


def write_folder(folder, *, config=None, generation=None, settings=None, template_file=None, bos=False):
    """A byte-level tokenizer in the layout of a Hugging Face model folder."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    pieces = {piece: index for index, piece in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", pieces["<s>"])])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | (settings or {})
    for name, content in (("config", config), ("generation_config", generation), ("tokenizer_config", settings)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    if template_file is not None:
        (folder / "chat_template.jinja").write_text(template_file)
    return folder


@pytest.mark.parametrize("template", [CHATML, BUSY], ids=["chatml", "busy"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("in_file", [True, False])
def test_chat_text_is_that_of_transformers(tmp_path, template, add_generation_prompt, in_file):
    folder = write_folder(
        tmp_path,
        settings={"eos_token": "<|im_end|>"} | ({} if in_file else {"chat_template": template}),
        template_file=template if in_file else None,
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    text = Tokenizer.load(folder).render_chat(CONVERSATION, add_generation_prompt=add_generation_prompt)
    expected = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert text == expected
    assert "why" in text


@pytest.mark.parametrize("bos", [True, False])
def test_ids_are_those_of_transformers(tmp_path, bos):
    folder = write_folder(tmp_path, settings={"eos_token": "<|endoftext|>"}, bos=bos)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    text = "Hallo, é 2+2=\n<|im_start|>x"
    assert ours.encode(text).tolist() == theirs.encode(text)
    assert ours.encode(text).dtype == np.int32
    without = ours.encode(text, add_special_tokens=False)
    assert without.tolist() == theirs.encode(text, add_special_tokens=False)
    assert len(ours.encode(text)) == len(without) + bos
    assert ours.decode(without, skip_special_tokens=False) == text
    assert ours.decode(without) == "Hallo, é 2+2=\nx"
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize(
    ("files", "eos_ids", "pad_id"),
    [
        ({"settings": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}}, (2,), 0),
        ({"settings": {"eos_token": {"content": "<|im_end|>"}}, "generation": {"eos_token_id": [0, 2]}}, (2, 0), 2),
        ({"config": {"eos_token_id": 0}, "generation": {"eos_token_id": 2}}, (2, 0), 2),
        ({"config": {"eos_token_id": 0}, "generation": {"eos_token_id": None}}, (0,), 0),
    ],
)
def test_eos_and_pad(tmp_path, files, eos_ids, pad_id):
    tokenizer = Tokenizer.load(write_folder(tmp_path, **files))
    assert tokenizer.eos_ids == eos_ids
    assert tokenizer.eos_id == eos_ids[0]
    assert tokenizer.pad_id == pad_id


def test_named_templates_take_the_default(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = write_folder(tmp_path, settings={"eos_token": "<s>", "chat_template": named})
    assert Tokenizer.load(folder).render_chat(CONVERSATION) == "D"


def test_errors_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"model.path must be an existing folder, got '.*nowhere'"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold tokenizer.json, not found: '.*tokenizer.json'"):
        Tokenizer.load(tmp_path)
    folder = write_folder(tmp_path / "a")
    with pytest.raises(ValueError, match=r"end-of-sequence token must be named .* found none"):
        Tokenizer.load(folder)
    (folder / "config.json").write_text("{]")
    with pytest.raises(ValueError, match=r"config.json' must be JSON"):
        Tokenizer.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json' must hold a JSON object, got list"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json' must be a tokenizer"):
        Tokenizer.load(folder)


def test_refused_conversations(tmp_path):
    plain = Tokenizer.load(write_folder(tmp_path / "plain", settings={"eos_token": "<s>"}))
    with pytest.raises(ValueError, match=r"data.chat_template must be false"):
        plain.render_chat(CONVERSATION)
    busy = Tokenizer.load(write_folder(tmp_path / "busy", settings={"eos_token": "<s>"}, template_file=BUSY))
    with pytest.raises(ValueError, match=r"chat template refuses the messages: unknown role tool"):
        busy.render_chat([{"role": "tool", "content": "x"}])


def test_pieces_are_what_every_token_adds(tmp_path):
    write_folder(tmp_path, config={"eos_token_id": 2})
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a é<|im_end|>\n", add_special_tokens=False)
    # One token a byte: the two bytes of the letter make it together.
    assert tokenizer.pieces(ids) == ["a", " ", "", "é", "<|im_end|>", "\n"]
    cut = ids[:3]
    assert "".join(tokenizer.pieces(cut)) == tokenizer.decode(cut, skip_special_tokens=False)
    assert tokenizer.pieces([]) == []
