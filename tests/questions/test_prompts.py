"""Prompts: tokens of a prompt and of its answers are what the tokenizer makes of the text, for the
default and for others.
"""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_fx.errors import InputError
from polar_fx.judge.grading import extract
from polar_fx.questions import (
    DIRECT,
    PLAIN,
    TASKS,
    DecodeStop,
    PromptTemplate,
    Question,
    generate,
    get_template,
)

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@cache
def _tokenizer(
    merge: tuple[str, ...] = (), bos: bool = False, eos: bool = True, chat: str | None = None
) -> Any:
    """Bytes as tokens, and one for each of `merge`: what a byte-level BPE does at its most
    eager.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    merges = []
    for text in merge:
        chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
            text
        )[0][0]
        whole = chars[0]
        for char in chars[1:]:
            merges.append((whole, char))
            whole += char
            vocabulary.setdefault(whole, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>" if eos else None
    )
    made.chat_template = chat
    return made


OTHERS = {
    "bytes": _tokenizer,
    "bytes with bos": lambda: _tokenizer(bos=True),
    "a chat": lambda: _tokenizer(chat=CHAT),
    "merged line breaks": lambda: _tokenizer(("\n\n", "9\n", "}\n", "1234"), bos=True),
    "merged prefix": lambda: _tokenizer((" 7", "\nQ", "n: x", ".\n\n7", " x")),
}


def _check(tokenizer: Any, template: PromptTemplate, *, questions: list[Question]) -> None:
    encoded = template.encode_all(tokenizer, questions)
    assert len({e.prefix for e in encoded}) == 1
    in_chat = template.chat and tokenizer.chat_template is not None
    for question, e in zip(questions, encoded, strict=True):
        text = template.text(tokenizer, question.question)
        prompt = list(e.prefix + e.prompt)
        assert (
            prompt == tokenizer(text, add_special_tokens=not in_chat).input_ids
            and e.prompt
            and e.id == question.id
        )
        assert len(e.targets) == len(set(question.answers))
        for answer, target in zip(dict.fromkeys(question.answers), e.targets, strict=True):
            stop = template.decode_stop(tokenizer)
            written = template.answer.replace("{answer}", answer)
            whole = prompt + list(target)
            if stop.strings:
                assert (
                    whole
                    == tokenizer(
                        text + written + template.stop, add_special_tokens=not in_chat
                    ).input_ids
                )
            else:
                assert whole[-1] == stop.token_ids[0]
                assert (
                    whole[:-1]
                    == tokenizer(text + written, add_special_tokens=not in_chat).input_ids
                )
            # a generator that ends there, and the extraction, give the answer back
            assert (
                extract(tokenizer.decode(target, skip_special_tokens=True), stop.strings).answer
                == answer.strip()
            )
            assert len(target) <= template.max_new_tokens


def _templates(task: str) -> list[PromptTemplate]:
    return [get_template(name, task) for name in ("few-shot", "direct", "plain")]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_tokens_of_the_default_model(task: str, smollm2: tuple[Any, Any]) -> None:
    for template in _templates(task):
        _check(smollm2[1], template, questions=generate(task, 40, 1))


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("name", OTHERS)
def test_tokens_of_other_tokenizers(name: str, task: str) -> None:
    for template in _templates(task):
        wide = PromptTemplate(**{**vars(template), "max_new_tokens": 50})  # bytes are many
        _check(OTHERS[name](), wide, questions=generate(task, 20, 1))


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20).filter(
    lambda t: t.strip() != ""
)


@settings(max_examples=60, deadline=None)
@given(
    WORDS,
    st.lists(WORDS.map(str.strip), min_size=1, max_size=3),
    st.sampled_from(sorted(OTHERS)),
    st.booleans(),
)
def test_any_question_is_sound_or_refused(
    question: str, answers: list[str], name: str, direct: bool
) -> None:
    template = DIRECT if direct else PLAIN
    template = PromptTemplate(**{**vars(template), "max_new_tokens": 500})
    tokenizer = OTHERS[name]()
    row = Question("q", "t", question, tuple(answers))
    try:
        encoded = template.encode(tokenizer, row)
    except InputError:
        assert name == "merged prefix"
        return
    text = template.text(tokenizer, question)
    in_chat = template.chat and tokenizer.chat_template is not None
    assert (
        list(encoded.prefix + encoded.prompt)
        == tokenizer(text, add_special_tokens=not in_chat).input_ids
    )


def test_the_prefix_holds_what_all_prompts_begin_with(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    for task in TASKS:
        template = get_template("few-shot", task)
        encoded = template.encode(tokenizer, generate(task, 1)[0])
        shown = template.prompt.partition("{question}")[0]
        assert tokenizer.decode(encoded.prefix) == shown.rstrip(" ")


# what a mistake says


def _row(question: str = "7", *answers: str) -> Question:
    return Question("the-id", "t", question, answers or ("19",))


def test_an_answer_merged_into_the_prompt_is_refused() -> None:
    template = PromptTemplate("mine", 3, "{question} = ", answer="{answer}")
    message = (
        r"prompt template mine@3, question 'the-id': the tokenizer merges the end "
        r"of the prompt with the answer '19'; "
        r"move white space between `prompt` and `answer` of the template"
    )
    with pytest.raises(InputError, match=message):
        template.encode(_tokenizer((" 1",)), _row())
    moved = PromptTemplate("mine", 4, "{question} =")
    _check(_tokenizer((" 1",)), moved, questions=[_row()])


def test_a_question_merged_into_the_prefix_is_refused() -> None:
    template = PromptTemplate("mine", 1, "Q: {question}\nA:")
    with pytest.raises(
        InputError,
        match=(
            r"mine@1, question 'the-id': the tokenizer begins this prompt otherwise"
            r".*a line break"
        ),
    ):
        template.encode(_tokenizer((": z",)), _row("z"))


def test_an_empty_question_and_no_answer_are_refused() -> None:
    template = PromptTemplate("mine", 1, "Q: {question}")
    with pytest.raises(InputError, match="the question has no tokens of its own; give it a text"):
        template.encode(_tokenizer(), _row(" "))
    with pytest.raises(InputError, match="it has no accepted answer; give at least one"):
        template.encode(_tokenizer(), Question("q", "t", "7", ()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": "Q"},
            r"prompt of the prompt template 'mine' holds \{question\} 0 times; write it once",
        ),
        ({"prompt": "{question}{question}"}, r"holds \{question\} 2 times"),
        ({"answer": "19"}, r"answer of the prompt template 'mine' holds \{answer\} 0 times"),
        (
            {"max_new_tokens": 0},
            "max_new_tokens of the prompt template 'mine' is 0; give a whole number from 1",
        ),
        ({"version": "1"}, "version of the prompt template 'mine' is '1'"),
        ({"version": True}, "version of the prompt template 'mine' is True"),
    ],
)
def test_fields_of_a_template(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptTemplate(**{"name": "mine", "version": 1, "prompt": "{question}", **fields})


def test_unknown_prompts() -> None:
    with pytest.raises(
        InputError,
        match="unknown prompt 'cot'; use one of few-shot, direct, plain, choices, choices-norm, or "
        "make a PromptTemplate",
    ):
        get_template("cot")
    with pytest.raises(
        InputError,
        match="no few-shot prompt for the task 'svamp', only for addition, .*; use 'direct' or",
    ):
        get_template("few-shot", "svamp")
    assert get_template("direct", "svamp") is DIRECT and get_template("plain") is PLAIN
    assert get_template("few-shot", "addition").key.startswith("few-shot:addition@")


# where generation ends


def test_stops(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert DIRECT.decode_stop(tokenizer) == DecodeStop((end,), (), 50)
    assert PLAIN.decode_stop(tokenizer) == DecodeStop((end,), ("\n",), 16)


def test_a_turn_may_end_otherwise_than_the_text() -> None:
    chat, none = _tokenizer(chat=CHAT), _tokenizer()
    end, eos = chat.convert_tokens_to_ids("<|end|>"), chat.eos_token_id
    assert end != eos and DIRECT.decode_stop(chat).token_ids == (end, eos)
    assert DIRECT.encode(chat, _row()).targets[0][-1] == end
    assert DIRECT.decode_stop(none).token_ids == (eos,)
    # closes turns with no token of its own
    odd = _tokenizer(chat="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert DIRECT.decode_stop(odd).token_ids == (eos,)


def test_without_an_end_of_text_the_remedy_is_named() -> None:
    with pytest.raises(
        InputError,
        match=(
            r"direct@1 ends answers with the end of the text"
            r".*set tokenizer.eos_token, or give the"
        ),
    ):
        DIRECT.encode(_tokenizer(eos=False), _row())
    assert PLAIN.decode_stop(_tokenizer(eos=False)) == DecodeStop((), ("\n",), 16)


def test_braces_and_marks_in_a_question_are_text() -> None:
    for template in (PLAIN, DIRECT):
        wide = PromptTemplate(**{**vars(template), "max_new_tokens": 99})
        _check(
            _tokenizer(),
            wide,
            questions=[
                _row(r"\frac{a}{b} {question} {answer} {} %s", r"\frac{1}{2}", "{question}")
            ],
        )


def test_generated_text_is_graded_as_the_target(smollm2: tuple[Any, Any]) -> None:
    """Greedy decoding that ends by `decode_stop` says the same as comparing its tokens with the
    target.
    """
    import torch

    pytest.importorskip("math_verify")
    from polar_fx.judge.grading import grade

    model, tokenizer = smollm2
    template = get_template("few-shot", "multiplication")
    stop = template.decode_stop(tokenizer)
    for question in generate("multiplication", 6, 1, cells=["1x1 digits", "2x2 digits"]):
        encoded = template.encode(tokenizer, question)
        prompt = torch.tensor([encoded.prefix + encoded.prompt])
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=stop.max_new_tokens,
                eos_token_id=list(stop.token_ids),
                stop_strings=list(stop.strings),
                tokenizer=tokenizer,
                pad_token_id=tokenizer.eos_token_id,
            )[0, prompt.shape[1] :].tolist()
        exact = tuple(out) in encoded.targets
        assert (
            grade(tokenizer.decode(out, skip_special_tokens=True), question, stops=stop.strings)
            == exact
        )
