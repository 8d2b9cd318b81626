"""Tasks and prompts: questions, and what a model is asked."""

from .difficulty import levels, with_difficulty
from .loaders import load_dataset, load_jsonl
from .prompts import DecodeStop, PromptTemplate
from .question import EncodedQuestion, Question
from .tasks import TASKS, Split, cell_sample, generate, get_task, split_of
from .templates import DIRECT, FEW_SHOT, PLAIN, TEMPLATES, get_template

__all__ = [
    "DIRECT",
    "FEW_SHOT",
    "PLAIN",
    "TASKS",
    "TEMPLATES",
    "DecodeStop",
    "EncodedQuestion",
    "PromptTemplate",
    "Question",
    "Split",
    "cell_sample",
    "generate",
    "get_task",
    "get_template",
    "levels",
    "load_dataset",
    "load_jsonl",
    "split_of",
    "with_difficulty",
]
