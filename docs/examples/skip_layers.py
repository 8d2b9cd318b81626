"""Skip layers in a script that was written for transformers: two lines change.

python docs/examples/skip_layers.py [FOLDER_OR_MODEL_ID]
"""

import sys

import polar_fx

PROMPT = "2 * 3 = 6\n7 * 4 = 28\n5 * 5 = 25\n6 * 7 ="

# any causal LM that transformers loaded will do; without an argument it is the embedded SmolLM2
model, tokenizer = polar_fx.load(*sys.argv[1:2])
inputs = tokenizer(PROMPT, return_tensors="pt")

# first changed line: the graph is captured once; "eager" interprets it, leave it out to compile
compiled = polar_fx.compile(model, "eager", max_length=128)

last = compiled.depth - 1
for program in ("identity", "skip 1", f"skip {last - 1}", f"repeat {last - 1} x2 @0.5"):
    # second changed line: `compiled` in the place of `model`, and a program
    tokens = compiled.generate(**inputs, program=program, max_new_tokens=3, do_sample=False)
    print(f"{program:20} {tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :])!r}")

# rows of one batch may run different programs
batch = tokenizer([PROMPT, PROMPT], return_tensors="pt")
tokens = compiled.generate(
    **batch, program=["identity", "skip 1"], max_new_tokens=3, do_sample=False
)
print(tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :]))
