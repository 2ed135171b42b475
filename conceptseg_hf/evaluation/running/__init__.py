"""Evaluation runs: a model on benchmarks (`evaluator`), and the variants of an ablation (`ablation`)."""
