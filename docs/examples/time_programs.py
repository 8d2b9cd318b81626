"""Compile a model once, then time decoding by several programs.

python docs/examples/time_programs.py [FOLDER_OR_MODEL_ID [BACKEND]]
"""

import statistics
import sys
import time

import torch

import polar_fx

arguments = dict(enumerate(sys.argv))
name, backend = arguments.get(1), arguments.get(2, "auto")
TOKENS = 16

model, tokenizer = polar_fx.load(name)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids

start = time.perf_counter()
compiled = polar_fx.compile(model, backend, max_length=63)
compiled.warmup()  # otherwise the first calls compile
print(f"ready after {time.perf_counter() - start:.1f} s, {len(compiled.compilations)} compiled")

half = compiled.depth // 2
for text in ("identity", f"skip 1-{half}", f"repeat 1-{half}"):
    program = compiled.resolve(text)
    times = []
    with torch.no_grad(), compiled.session(program, 1) as session:
        (logits,) = compiled.prefill(program, session, [ids[0]])
        for _ in range(TOKENS):
            token = logits.argmax(-1).reshape(1)
            start = time.perf_counter()
            logits = compiled.decode(program, session, token)
            times.append(time.perf_counter() - start)
    median = 1e3 * statistics.median(times)
    print(f"{text:14} {program.num_steps:3} steps, {median:7.2f} ms a token")
