"""The tuner: Optuna's search over a family's knobs, run in processes that may die. `study.tune` is its door."""
