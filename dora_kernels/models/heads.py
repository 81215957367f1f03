"""The heads of classifiers: they are new, so that no adapter can teach them; PEFT trains them in full."""

from dataclasses import replace

from torch import nn

from ..config import DoraConfig
from .targets import find_saved

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""By PEFT's task type, the ends of the names of what it trains in full although a config may not say so."""
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""By the end of a transformers class's name, PEFT's task type."""


def head_task(model: nn.Module) -> str | None:
    """The task type in which PEFT trains this model's head in full, None if it has no such head."""
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    return task if _heads(model, task) else None


def with_head(model: nn.Module, config: DoraConfig) -> DoraConfig:
    """`config` with a classifier's head in `modules_to_save`, as PEFT has it, unless that is an empty list."""
    heads = _heads(model, head_task(model))
    if not heads or config.modules_to_save == []:
        return config
    return replace(config, modules_to_save=[*(config.modules_to_save or ()), *heads])


def trains_head(model: nn.Module, config: DoraConfig) -> bool:
    """Whether `config` names all of the head that PEFT would train."""
    heads = find_saved(model, replace(config, modules_to_save=_heads(model, head_task(model))))
    return all(any(path == own or path.startswith(f"{own}.") for own in find_saved(model, config)) for path in heads)


def _heads(model: nn.Module, task: str | None) -> list[str]:
    """Of a task's names, those that the model has."""
    names = [name for name, _ in model.named_modules()]
    return [head for head in HEADS.get(task, ()) if any(name.endswith(head) for name in names)]
