"""A tiny model whose answers vary with the program, questions it can be asked, and a tokenizer for
whole folders.
"""

import random
from pathlib import Path
from typing import Any

import torch

from polar_fx.compiled import CompiledModel
from polar_fx.program import Edit, Op, Program
from polar_fx.questions import EncodedQuestion
from tiny_models import make


def peaked(family: str = "llama", depth: int = 6, **options: Any) -> Any:
    """Weights large enough that programs disagree about the next token."""
    options = {"num_hidden_layers": depth, "initializer_range": 0.4, "vocab_size": 40, **options}
    return make(family, **options)


def random_programs(depth: int, count: int, *, seed: int = 0) -> list[Program]:
    """Paths of all kinds: edits of the identity, nested ones, damped ones, and layers in any
    order.
    """
    rng = random.Random(seed)
    found = [
        Program.identity(depth),
        Program.parse("0-1 (2-3)*2@0.5 4-5", depth),
        Program.parse("[0-2]@0.5 4 [4-5]@0.25", depth),
    ]
    while len(found) < count:
        start = rng.randrange(depth)
        length = rng.randint(1, min(2, depth - start))
        edit = (
            Edit(start, length, Op.SKIP)
            if rng.random() < 0.5
            else Edit(start, length, Op.REPEAT, rng.randint(2, 3))
        )
        anywhere = Program.from_path(
            [rng.randrange(depth) for _ in range(rng.randint(1, depth + 3))], depth
        )
        found.append(rng.choice([Program.from_edits([edit], depth), anywhere]))
    return found


def generated(
    compiled: CompiledModel, question: EncodedQuestion, *, program: Program, tokens: int
) -> tuple[int, ...]:
    """The first tokens of greedy decoding."""
    ids = torch.tensor([question.prefix + question.prompt])
    out = compiled.generate(
        ids,
        program=program,
        attention_mask=torch.ones_like(ids),  # token 0 is a word of these prompts, too
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def questions(
    compiled: CompiledModel, programs: list[Program], *, count: int = 8, seed: int = 0
) -> list[EncodedQuestion]:
    """Questions with shared and without any prefix, of one token and more, whose answers some
    program gives.
    """
    rng = random.Random(seed)
    shared = tuple(rng.randrange(40) for _ in range(7))
    found = []
    for i in range(count):
        prefix = (shared, shared[:4], ())[i % 3]
        prompt = tuple(rng.randrange(40) for _ in range(rng.randint(1, 5)))
        asked = EncodedQuestion(f"q{i}", prefix, prompt, ((0,),))
        answers = tuple(
            generated(compiled, asked, program=program, tokens=rng.randint(1, 3))
            for program in rng.sample(programs, 1 + i % 2)
        )
        found.append(EncodedQuestion(asked.id, prefix, prompt, answers))
    return found


def save_tiny(folder: Path, depth: int = 6, **options: Any) -> Path:
    """A folder with a tiny model and a tokenizer of single bytes, as `--model` takes it; `options`
    are those of the model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    special: dict[str, Any] = dict(eos_token_id=0, bos_token_id=None, pad_token_id=0, **options)
    peaked("llama", depth, vocab_size=len(vocabulary), **special).save_pretrained(folder)
    return folder


def save_tiny_encoder(folder: Path, **options: Any) -> Path:
    """A folder with a tiny text encoder and a tokenizer of characters; `options` are those of the
    tokenizer.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {
        text: i
        for i, text in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    options = {"pad_token": "[PAD]", **options}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", **options
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder
