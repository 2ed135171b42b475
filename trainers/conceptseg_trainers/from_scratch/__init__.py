"""Training of small checkpoints from scratch: what `nano` and `mini` have in common.

A stage trains one part of the model (`sam_stage`, `vlm_stage`, `ctm_stage`) in the loop of `loop`. The packages `nano`
and `mini` contain the data of the stages, tokenizers and settings.
"""
