"""Experiments on the two claims of the paper with the nano model: the benefits of Meta-GRPO and of the concept tokens.

All experiments start from a base checkpoint. Its VLM was trained to choose a random object in the families
`vlm_data.RANDOM_CHOICE_FAMILIES` (stage "base"). `arms` defines the variants of stage II, `training` trains them,
`measuring` evaluates them, and `tables` compares the results.
"""
