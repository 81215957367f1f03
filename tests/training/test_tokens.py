"""Token ids and labels against TRL's own, and where they are cut."""

import warnings

import datasets
import numpy as np
import pytest
import trl
from transformers import AutoTokenizer

from tests.support.tiny_models import llama
from training import demo
from training.data.kinds import KINDS, content_of, problem_of
from training.data.order import IGNORED
from training.data.tokens import CHAT_TEMPLATE, Tokens, template_end, tokenized, training_template

USER, ANSWER = {"role": "user", "content": "two red mugs"}, {"role": "assistant", "content": "red mugs"}
# A template that opens with a token of its own, and that writes a prompt for a generation.
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '[' + message['role'] + '] ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
CASES = {
    "text": ({"text": "two red mugs"}, {}),
    "text with its end": ({"text": "two red mugs<eos>"}, {}),
    "prompt + completion": ({"prompt": "Input: two red mugs\n", "completion": "red mugs"}, {}),
    "tokens merge between": ({"prompt": "Input: two red mu", "completion": "gs"}, {}),
    "conversation": ({"messages": [USER, ANSWER, USER, ANSWER]}, {}),
    "conversation, assistant alone": ({"messages": [USER, ANSWER, USER, ANSWER]}, {"assistant_only_loss": True}),
    "prompt + completion of messages": ({"prompt": [USER], "completion": [ANSWER]}, {}),
}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.BASE)


@pytest.fixture(scope="module")
def model():
    return llama()


def of_trl(row, model, tokenizer, folder, **options):
    """The row as TRL's SFTTrainer prepares it from text."""
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_length=None, use_cpu=True, report_to=[], bf16=False, disable_tqdm=True, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = datasets.Dataset.from_list([row])
        trainer = trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    return trainer.train_dataset[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TEMPLATE], ids=["ours", "another"])
def test_tokens_and_labels_are_those_of_trl(case, template, model, tokenizer, tmp_path):
    row, options = CASES[case]
    tokenizer.chat_template = template
    kind = next(kind for kind, columns in KINDS.items() if set(columns) <= row.keys())
    ours = tokenized(content_of(row, kind), tokenizer, **options)
    theirs = of_trl(row, model, tokenizer, tmp_path, **options)
    assert ours.ids.tolist() == theirs["input_ids"] and ours.labels.tolist() == theirs["labels"]
    assert 0 < ours.trained <= len(ours.ids)


def test_a_cut_keeps_the_beginning():
    ids = np.arange(5, dtype=np.int32)
    cut = Tokens(ids, np.array([IGNORED, IGNORED, 2, 3, 4], dtype=np.int32)).cut(3)
    assert cut.ids.tolist() == [0, 1, 2] and cut.labels.tolist() == [IGNORED, IGNORED, 2]
    assert cut.trained == 1 and cut.cut(2).trained == 0


def test_the_first_token_is_not_trained():
    ids = np.array([7], dtype=np.int32)
    assert Tokens(ids, ids).trained == 0


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}" + CHAT_TEMPLATE
    for tools in ([{"name": "mugs"}], '[{"name": "mugs"}]'):
        content = content_of({"messages": [USER, ANSWER], "tools": tools}, "messages")
        assert tokenizer.decode(tokenized(content, tokenizer).ids).startswith("mugs User")


def test_a_call_of_a_tool_needs_no_text(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "mugs"}}]}
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] or m['tool_calls'][0]['function']['name'] }} {% endfor %}"
    )
    row = {"messages": [USER, call]}
    assert problem_of(row, "messages") is None
    assert tokenizer.decode(tokenized(content_of(row, "messages"), tokenizer).ids) == "two red mugs mugs "
    assert "should be text, got NoneType" in problem_of({"messages": [USER, call | {"tool_calls": []}]}, "messages")


def test_a_template_without_marks_cannot_train_the_assistant_alone(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    assert training_template(tokenizer) is None
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="`--assistant_only_loss` cannot be used with this chat template"):
        training_template(tokenizer)


def test_the_end_that_a_template_writes(tokenizer):
    for template, end in ((CHAT_TEMPLATE, None), ("{{ messages[1]['content'] }}<end>", "<end>"), ("{{ x.y.z }}", None)):
        tokenizer.chat_template = template
        assert template_end(tokenizer) == end
