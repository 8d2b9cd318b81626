"""Tasks and prompts: questions, and what a model is asked."""

from .choices import ChoiceTemplate, best_choice, choice_template
from .difficulty import levels, with_difficulty
from .loaders import load_dataset, load_jsonl
from .prompts import DecodeStop, PromptTemplate
from .question import ChoiceKey, EncodedQuestion, Question, Split
from .tasks import TASKS, cell_sample, generate, get_task, split_of
from .templates import (
    DIRECT,
    FEW_SHOT,
    PLAIN,
    TEMPLATES,
    Template,
    any_template,
    get_template,
)

__all__ = [
    "DIRECT",
    "FEW_SHOT",
    "PLAIN",
    "TASKS",
    "TEMPLATES",
    "ChoiceKey",
    "ChoiceTemplate",
    "DecodeStop",
    "EncodedQuestion",
    "PromptTemplate",
    "Question",
    "Split",
    "Template",
    "any_template",
    "best_choice",
    "cell_sample",
    "choice_template",
    "generate",
    "get_task",
    "get_template",
    "levels",
    "load_dataset",
    "load_jsonl",
    "split_of",
    "with_difficulty",
]
