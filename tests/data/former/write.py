"""Writes the files of this folder, with the polar_fx that is first on PYTHONPATH; see README.md.

Every part of polar_fx used here had the same name in the commit that wrote the files and has it
today, so the folder can be written anew by either.

Shape legend: P programs, T tokens, V vocabulary.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import polar_fx
from polar_fx.backends import AotInductorBackend, EagerBackend
from polar_fx.cli import main
from polar_fx.search import TeacherForcing, Verdict

PROGRAMS = ("identity", "skip 1", "0 (1-2)*2@0.5 3")
PROMPT = [72, 101, 108, 108, 111, 33]
SEARCH = ["--simulations", "12", "--prompt", "plain", "--deterministic"]
TRAIN = ["--prompt", "plain", "--after-steps", "1", "--menu", "4", "--candidates", "6"]
TRAIN += ["--edits", "4", "--variations", "2", "--screen-questions", "24", "--finalists", "4"]
TRAIN += ["--final-questions", "16", "--networks", "1", "--epochs", "20", "--width", "4"]


def save_model(folder: Path) -> None:
    """A model of four layers with random weights, and a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    sizes: dict[str, Any] = dict(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.6,  # large enough that programs disagree about the next token
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder)


def save_questions(path: Path, count: int) -> None:
    rows = [
        {"id": f"r{i}", "task": "odd", "question": f"{i}?", "answer": str(i)} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def let_one_program_answer_each_question(depth: int) -> None:
    """Random weights answer nothing, so which program is right is said here: each in turn."""
    right = [polar_fx.Program.parse(text, depth) for text in PROGRAMS[:2]]

    def evaluate(self: Any, pairs: Any) -> list[Verdict]:
        found = [program == right[int(question.id[1:]) % len(right)] for question, program in pairs]
        return [Verdict(yes, -0.1 if yes else -4.0, 1.0 if yes else -1.0) for yes in found]

    TeacherForcing.evaluate = evaluate  # type: ignore[method-assign]


def write_graphs_as_regions() -> None:
    """Let bundles hold the exported graph of each region in the place of machine code, so that any
    machine can run them.
    """

    def build(self: AotInductorBackend, folder: Path) -> None:
        exported = torch.export.load(folder / "graph.pt2")
        for node in exported.graph.nodes:  # where a node was traced is long, and names places
            for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(name, None)
        torch.export.save(exported, folder / "region.pt2")

    def load(self: AotInductorBackend, files: Any) -> Any:
        graph = torch.export.load(files["region.pt2"]).graph_module
        return EagerBackend().compile_region(graph, [], [])

    AotInductorBackend.build, AotInductorBackend.load = build, load  # type: ignore[method-assign]


def save_choices(model: Any) -> None:
    """Which programs the predictor chooses for prompts of one byte, and how likely they are."""
    settings: dict[str, Any] = dict(
        max_length=31, cache=False, predictor="predictor", policy="mean_steps<=0.8"
    )
    compiled = polar_fx.compile(model, "eager", **settings)
    compiled.warmup()
    rows = [choice_of(compiled, token) for token in range(65, 73)]
    Path("choices.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def choice_of(compiled: Any, token: int) -> dict[str, Any]:
    """The program of the prompt that is this token, and how likely it is right."""
    (decision,) = compiled.dispatcher.choose(torch.tensor([[token]]))
    return {
        "token": token,
        "program": str(decision.program),
        "probability": round(float(decision.probability), 6),
    }


def run(*arguments: str) -> None:
    if main([str(a) for a in arguments]) != 0:
        raise SystemExit(f"{arguments} failed")


def write(folder: Path) -> None:
    """All files, in the working directory `folder`, so that records name no place of a machine."""
    os.chdir(folder)
    save_model(Path("model"))
    model, tokenizer = polar_fx.load("model")
    compiled = polar_fx.compile(model, "eager", max_length=31, cache=False)
    logits = [compiled.forward(torch.tensor([PROMPT]), program=p)[0] for p in PROGRAMS]
    save_file({"logits": torch.stack(logits)}, "expected.safetensors")  # [P, T, V]
    save_questions(Path("questions.jsonl"), 96)
    let_one_program_answer_each_question(compiled.depth)
    asked = ["--model", "model", "--backend", "eager", "--data", "questions.jsonl"]
    run("search", *asked, *SEARCH, "--questions", "12", "--out", "run.jsonl")
    run("train", "run.jsonl", *asked, *TRAIN, "--out", "predictor")
    save_choices(model)
    run("export", "--model", "model", "--form", "onnx", "--out", "onnx", "--programs", PROGRAMS[2])
    write_graphs_as_regions()
    compiled = polar_fx.compile(model, "aot_inductor", max_length=31, cache=False, workers=0)
    polar_fx.export(compiled, "bundle", PROGRAMS, tokenizer=tokenizer)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
