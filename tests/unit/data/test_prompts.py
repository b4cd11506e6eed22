"""Templates, tokenisation and the endless stream, on a real tokenizer and on generated problems."""

import logging

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_rlvr.config.schema import DataConfig, ReasoningGymSpec, RewardConfig
from megatron_rlvr.data.problems import Problem, load_problems
from megatron_rlvr.data.prompts import PromptBuilder, PromptStream
from megatron_rlvr.data.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def make_tokenizer(chat_template=None):
    pieces = {piece: index for index, piece in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=[0], pad_id=0, chat_template=chat_template)


def make_builder(**options):
    settings = {"system_prompt": None, "prompt_template": None, "chat_template": False, "max_prompt_tokens": 1000}
    tokenizer = make_tokenizer(TEMPLATE if options.get("chat_template") else None)
    return PromptBuilder(tokenizer, **(settings | options))


def make_problem(text="2+2=", index=0, **options):
    settings = {"messages": [{"role": "user", "content": text}], "answer": "4", "data_source": "sums"}
    return Problem(uid=f"train/{index}", **(settings | options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "{x}+2="),
        ({"prompt_template": "Q: {prompt}\nA:"}, "Q: {x}+2=\nA:"),
        ({"system_prompt": "Be short."}, "Be short.\n\n{x}+2="),
        ({"chat_template": True}, "<user>{x}+2=>"),
        (
            {"chat_template": True, "system_prompt": "Be short.", "prompt_template": "{prompt} {y}"},
            "<system>Be short.<user>{x}+2= {y}>",
        ),
    ],
)
def test_text_and_tokens(options, text):
    problem = make_problem("{x}+2=", metadata={"k": 1})
    prompt = make_builder(**options).build(problem)
    assert prompt.text == text
    assert make_tokenizer().decode(prompt.input_ids) == text
    assert prompt.input_ids.dtype == np.int32
    assert (prompt.uid, prompt.answer, prompt.data_source, prompt.metadata) == ("train/0", "4", "sums", {"k": 1})
    assert problem.messages == [{"role": "user", "content": "{x}+2="}]


def test_longer_prompts_are_dropped_and_counted():
    builder = make_builder(max_prompt_tokens=4)
    assert builder.build(make_problem("12345")) is None
    prompts, num_too_long = builder.build_all([make_problem("1234"), make_problem("12345"), make_problem("1")])
    assert [prompt.text for prompt in prompts] == ["1234", "1"]
    assert num_too_long == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "Q:"}, r"data.prompt_template must contain '\{prompt\}', got 'Q:'"),
        ({"max_prompt_tokens": 0}, r"data.max_prompt_tokens must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_builder(**options)


def test_chat_template_must_exist():
    with pytest.raises(ValueError, match=r"data.chat_template must be false for this model"):
        PromptBuilder(
            make_tokenizer(), system_prompt=None, prompt_template=None, chat_template=True, max_prompt_tokens=9
        )


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (
            [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
            {},
            "data.chat_template must be true",
        ),
        ([{"role": "system", "content": "a"}], {"system_prompt": "b"}, "data.system_prompt must be null"),
        ([{"role": "user", "content": ""}], {}, "no tokens"),
    ],
)
def test_broken_problems_are_named(messages, options, message):
    problem = make_problem(messages=messages, metadata={"file": "rows.jsonl", "line": 7})
    with pytest.raises(ValueError, match=rf"problem train/0 \(rows.jsonl:7\) cannot become a prompt: .*{message}"):
        make_builder(**options).build(problem)


def draw(stream, num_prompts):
    return [(index, prompt.uid) for index, prompt in stream.next(num_prompts)]


def make_stream(texts, *, seed=0, max_prompt_tokens=1000):
    problems = [make_problem(text, index) for index, text in enumerate(texts)]
    return PromptStream(problems, make_builder(max_prompt_tokens=max_prompt_tokens), seed=seed)


def test_every_epoch_is_another_permutation():
    stream = make_stream("abcdefghij")
    epochs = [[uid for _, uid in draw(stream, 10)] for _ in range(3)]
    assert all(sorted(epoch) == [f"train/{i}" for i in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.epoch == 2
    assert draw(make_stream("abcdefghij"), 20)[10:] == list(zip(range(10, 20), epochs[1], strict=True))
    assert [uid for _, uid in draw(make_stream("abcdefghij", seed=1), 10)] != epochs[0]


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 20])
def test_resume_continues_to_the_letter(taken):
    texts = ["a", "bb", "ccccc", "d", "", "e", "f"]
    whole, first, resumed = (make_stream(texts, seed=5, max_prompt_tokens=3) for _ in range(3))
    expected = draw(whole, taken + 30)
    assert draw(first, taken) == expected[:taken]
    resumed.load_state_dict(first.state_dict())
    assert draw(resumed, 30) == expected[taken:]
    assert resumed.state_dict() == whole.state_dict()
    assert whole.num_too_long >= 5
    assert whole.num_broken >= 5


def test_resume_refuses_another_data_order():
    state = make_stream("abc", seed=1).state_dict()
    with pytest.raises(ValueError, match=r"seed of the data order must be as saved \(1\) to resume, got 2"):
        make_stream("abc", seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"num_problems of the data order must be as saved \(3\) to resume, got 4"):
        make_stream("abcd", seed=1).load_state_dict(state)


def test_broken_and_too_long_problems_are_skipped_and_counted(caplog):
    stream = make_stream(["a", "", "long", "b"], max_prompt_tokens=3)
    with caplog.at_level(logging.WARNING):
        drawn = draw(stream, 4)
    assert sorted({uid for _, uid in drawn}) == ["train/0", "train/3"]
    assert [index for index, _ in drawn] == [0, 1, 2, 3]
    assert stream.num_too_long in (1, 2)
    assert stream.num_broken in (1, 2)
    assert "skipped a training problem: problem train/1 cannot become a prompt" in caplog.text


def test_a_stream_without_any_prompt_is_an_error():
    stream = make_stream(["long", "longer", ""], max_prompt_tokens=3)
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens = 3 tokens, got none .* \(2 too long and 1 broken"):
        stream.next(1)
    with pytest.raises(ValueError, match=r"problems must hold at least one"):
        make_stream([])


def test_stream_over_generated_problems_resumes():
    config = DataConfig(reasoning_gym=[ReasoningGymSpec(name="chain_sum")], train_size=300, val_size=4)
    streams = [
        PromptStream(load_problems(config, RewardConfig()).train, make_builder(prompt_template="{prompt} "), seed=2)
        for _ in range(2)
    ]
    expected = streams[0].next(640)
    streams[1].next(290)
    resumed = PromptStream(
        load_problems(config, RewardConfig()).train, make_builder(prompt_template="{prompt} "), seed=2
    )
    resumed.load_state_dict(streams[1].state_dict())
    for (index, prompt), (expected_index, expected_prompt) in zip(resumed.next(350), expected[290:], strict=True):
        assert index == expected_index
        np.testing.assert_array_equal(prompt.input_ids, expected_prompt.input_ids)
        assert prompt.metadata == expected_prompt.metadata
