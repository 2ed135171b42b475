"""Runnable trainings: `python -m conceptseg_trainers.scripts.sft --config RECIPE` and `.meta_grpo`.

`conceptseg train` runs the same; under torchrun or `accelerate launch`, name the module.
"""
