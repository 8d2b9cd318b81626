"""Write a bundle, run it, and serve it over HTTP.

    python docs/examples/bundle_and_serve.py [FOLDER_OR_MODEL_ID [OUT]]

Serving needs `pip install -e '.[serve]'`, and goes on until Ctrl-C.
"""

import subprocess
import sys
from pathlib import Path

import polar_fx
from polar_fx.bundle import add_program

arguments = dict(enumerate(sys.argv))
out = Path(arguments.get(2, "bundle"))

model, tokenizer = polar_fx.load(arguments.get(1))
compiled = polar_fx.compile(model, "aot_inductor", max_length=127, workers=0)
manifest = polar_fx.export(compiled, out, ["identity", "skip 1"], tokenizer=tokenizer)
print(f"{manifest.num_bytes:,} bytes, fingerprint {manifest.fingerprint}")

add_program(out, "skip 2")  # rewrites the manifest alone

# in another process, without transformers' modeling code and without a compiler
bundle = polar_fx.load_bundle(out, fingerprint=manifest.fingerprint)
prompt = bundle.tokenizer("6 * 7 =", return_tensors="pt").input_ids
for program in bundle.programs:
    tokens = bundle.generate(prompt, program=program, max_new_tokens=4, do_sample=False)
    print(f"{program!s:12} {bundle.tokenizer.decode(tokens[0, prompt.shape[1] :])!r}")

# curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
#   -d '{"model": "bundle", "prompt": "6 * 7 =", "max_tokens": 4, "program": "skip 2"}'
serve = [sys.executable, "-m", "polar_fx", "serve", str(out)]
subprocess.check_call([*serve, "--fingerprint", manifest.fingerprint])
