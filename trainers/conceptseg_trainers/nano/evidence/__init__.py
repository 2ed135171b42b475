"""Experiments on the two claims of the paper, with the nano model: what Meta-GRPO teaches, and what Z carries.

All experiments start from a base checkpoint whose VLM was trained without the correct choice of object in the families
`vlm_stage.UNTAUGHT_FAMILIES` (stage "base"). `arms` defines the variants, `training` trains them, `measuring` evaluates
them, and `tables` compares the results.
"""
