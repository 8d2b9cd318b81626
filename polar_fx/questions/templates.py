"""The built-in prompts.

What the few-shot prompts measured: SmolLM2-135M-Instruct in bfloat16, greedy answers that are a
target exactly, rows of the train split (seed 11), right/asked by cell. Of several wordings, and
two, four or eight examples, the best by these rows is kept:

    addition         1+1 41/44   2+1 24/64   2+2 19/64   3+2 7/64   3+3 2/64 subtraction      1-1
    23/29   2-1 4/68    2-2 4/68    3-2 0/68   3-3 0/67 multiplication   1x1 30/33   2x1 16/69   3x1
    6/69    2x2 3/69 word-problems    1 step 2/20   2 steps 1/20   3 steps 1/20 (the wordings tried
    differ by less than the noise) sequences        repeating 23/30   small step 16/30   large step
    8/30   falling 9/30   growing step 1/30   multiplied 1/30

Of division and comparison, 100 rows of the test split (seed 0), in the one wording that each is
asked in:

    division         2/1 3/13   2/2 0/13   3/1 1/12   3/2 1/12
    comparison       2 of 1 digit 7/10   3 of 1 4/10   2 of 2 6/10   2 of 3 5/10   3 of 2 6/10

The sequences' numbers are for "What are the next numbers:" in place of the question's own words,
which were not measured; without that line it was 47/180 for 58/180, and examples did not help.
"""

from ..errors import InputError
from .choices import CHOICE_PROMPTS, ChoiceTemplate, choice_template
from .prompts import PromptTemplate
from .tasks import TASKS


def _few_shot(task: str, form: str, *, stop: str = "\n", shots: int = 4) -> PromptTemplate:
    """The task's examples written as `form`, then the question; `form` ends with a space, the
    answer and the stop.
    """
    examples = TASKS[task].examples[:shots]
    shown = "".join(
        form.replace("{question}", e.question).replace("{answer}", e.answer) for e in examples
    )
    return PromptTemplate(f"few-shot:{task}", 1, shown + form.partition(" {answer}")[0], stop=stop)


FEW_SHOT = {
    template.name.partition(":")[2]: template
    for template in (
        _few_shot("addition", "{question} = {answer}\n"),
        _few_shot("subtraction", "The result of {question} is {answer}\n"),
        _few_shot("multiplication", "The result of {question} is {answer}\n"),
        _few_shot("word-problems", "{question} Answer: {answer}\n"),
        _few_shot("sequences", "{question}, {answer},\n", stop=",", shots=0),
        _few_shot("division", "{question} = {answer}\n"),
        _few_shot("comparison", "{question} = {answer}\n"),
    )
}

# PoLar, section 4: no steps shown, the answer alone in a box, 50 new tokens at most.
DIRECT = PromptTemplate(
    "direct",
    1,
    "Answer the question directly, without any steps or explanation. Write only "
    "\\boxed{ANSWER}.\n\n{question}",
    answer="\\boxed{{answer}}",
    stop="",
    chat=True,
    max_new_tokens=50,
)
PLAIN = PromptTemplate("plain", 1, "Question: {question}\nAnswer:")

TEMPLATES = ("few-shot", "direct", "plain", *CHOICE_PROMPTS)

# How the questions of a task are asked.
Template = PromptTemplate | ChoiceTemplate


def any_template(name: str, task: str = "") -> Template:
    """A built-in prompt by name: one of `get_template`, or of `choice_template`.

    Raises InputError naming the known ones.
    """
    return choice_template(name, task) if name in CHOICE_PROMPTS else get_template(name, task)


def get_template(name: str, task: str = "") -> PromptTemplate:
    """A built-in prompt for answers that are written: `few-shot` (there is one for each built-in
    task), `direct` or `plain`.

    Raises InputError naming the known ones.
    """
    if name == "few-shot":
        if task in FEW_SHOT:
            return FEW_SHOT[task]
        raise InputError(
            f"there is no few-shot prompt for the task {task!r}, only for {', '.join(FEW_SHOT)}; "
            "use 'direct' or 'plain', or make a PromptTemplate"
        )
    for template in (DIRECT, PLAIN):
        if name == template.name:
            return template
    raise InputError(
        f"unknown prompt {name!r}; use one of {', '.join(TEMPLATES)}, or make a PromptTemplate"
    )
