"""From a search over questions to a predictor that chooses a program for each input.

    python docs/examples/search_to_predictor.py [FOLDER_OR_MODEL_ID [OUT [BACKEND]]]

The sizes are so small that it ends within minutes; docs/dispatch.md has those that were measured.
"""

import sys
from pathlib import Path

import polar_fx
from polar_fx.jobs import search, train
from polar_fx.jobs.questions import Asked
from polar_fx.search import SearchConfig
from polar_fx.search.workers import Workplace
from polar_fx.training.pipeline import TrainingConfig

arguments = dict(enumerate(sys.argv))
name, backend = arguments.get(1), arguments.get(3, "auto")
out = Path(arguments.get(2, "search-to-predictor"))
out.mkdir(exist_ok=True)

# which programs answer which questions? an interrupted run continues where it ended
asked = Asked(tasks=("addition",), count=24)
found = search.run(
    search.SearchJob(
        asked=asked,
        out=out / "run.jsonl",
        config=SearchConfig(simulations=20),
        workplace=Workplace(model=name, backend=backend),
    )
)
print(f"{found.questions} questions: {found.counts}")

# a small menu of programs, and a network that says how likely each answers an input
results = train.run(
    train.TrainJob(
        records=(found.out,),
        out=out / "predictor",
        asked=Asked(tasks=("addition",), count=80),
        config=TrainingConfig(
            menu_size=6, num_candidates=12, num_edits=12, num_variations=4, num_finalists=8
        ),
        workplace=Workplace(model=name, backend=backend),
    )
)
print("menu:", *(row["program"] for row in results["menu"]), sep="\n  ")

model, tokenizer = polar_fx.load(name)
compiled = polar_fx.compile(model, backend, max_length=128, predictor=out / "predictor")
compiled.warmup()
prompt = tokenizer("1 + 2 = 3\n2 + 2 = 4\n3 + 4 =", return_tensors="pt").input_ids
tokens, report = compiled.dispatch(prompt, max_new_tokens=2, do_sample=False)
print(tokenizer.decode(tokens[0, prompt.shape[1] :]), report.to_dict()["rows"])
