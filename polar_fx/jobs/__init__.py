"""Long offline work as library calls: settings in a dataclass, then `run`.

`search.SearchJob`, `train.TrainJob` and `evaluate.EvaluateJob` are what the commands of those names
run. Each goes on where an interrupted run of the same settings ended.
"""
