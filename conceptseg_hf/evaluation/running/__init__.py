"""Runs: a model over benchmarks (`evaluator`), and over the variants of an ablation (`ablation`)."""
