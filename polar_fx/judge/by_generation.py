"""Verdicts by generating and grading: what teacher forcing stands for, and the way where right
answers have many forms.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..compiled import CompiledModel
from ..program import Program
from ..questions.prompts import DecodeStop
from ..questions.question import EncodedQuestion, Question
from ..questions.templates import Template
from ..runtime.generator import padded_rows
from .grading import grade
from .verdict import Verdict


class Generation:
    """Judges (question, program) pairs by greedy generation, graded as text.

    Args:
        compiled: generates; compile it with deterministic=True for verdicts that do not depend on
            the batch.
        tokenizer: decodes.
        questions: by id, with their accepted answers.
        templates: the prompt of each task, which says where an answer ends.
        batch: rows generated at a time.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        tokenizer: Any,
        *,
        questions: Mapping[str, Question],
        templates: Mapping[str, Template],
        batch: int = 32,
    ) -> None:
        self.compiled, self.tokenizer, self.batch = compiled, tokenizer, batch
        self.questions, self.templates = questions, templates

    def evaluate(self, pairs: Sequence[tuple[EncodedQuestion, Program]]) -> list[Verdict]:
        """A verdict a pair, in order; questions that run one program are generated together."""
        groups: dict[tuple[Program, str], list[int]] = defaultdict(list)
        for i, (question, program) in enumerate(pairs):
            groups[program, self.questions[question.id].task].append(i)
        verdicts: dict[int, Verdict] = {}
        for (program, task), members in groups.items():
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                template = self.templates[task]
                stops = template.decode_stop(self.tokenizer).strings
                texts = self.answers([pairs[i][0] for i in part], program, template=template)
                for i, text in zip(part, texts, strict=True):
                    verdicts[i] = Verdict(grade(text, self.questions[pairs[i][0].id], stops=stops))
        return [verdicts[i] for i in range(len(pairs))]

    def forget(self, question_ids: Iterable[str]) -> None:
        """Nothing is kept."""

    def answers(
        self, questions: Sequence[EncodedQuestion], program: Program, *, template: Template
    ) -> list[str]:
        """What greedy decoding answers, up to the stop (and maybe beyond it)."""
        ids, arguments = generate_arguments(
            questions, self.tokenizer, stop=template.decode_stop(self.tokenizer)
        )
        out = self.compiled.generate(ids, program=program, do_sample=False, **arguments)[
            :, ids.shape[1] :
        ]
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)


def generate_arguments(
    questions: Sequence[EncodedQuestion], tokenizer: Any, *, stop: DecodeStop
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The prompts i64[B, T], padded on the left, and the other arguments of a `generate` that ends
    at `stop`.
    """
    ids, mask = padded_rows([q.prefix + q.prompt for q in questions])
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": stop.max_new_tokens}
    if stop.token_ids:
        arguments |= {"eos_token_id": list(stop.token_ids), "pad_token_id": stop.token_ids[0]}
    if stop.strings:
        arguments |= {"stop_strings": list(stop.strings), "tokenizer": tokenizer}
    return ids, arguments
