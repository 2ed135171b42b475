"""Runnable trainings: `python -m conceptseg_trainers.scripts.sft --config RECIPE` and `.meta_grpo`.

`conceptseg train` runs the same; under torchrun or `accelerate launch`, name the module.
"""

import logging

# PEFT imports bitsandbytes in any run; it warns there, and of nothing else, that an optional kernel for 4-bit layers on
# CPUs is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
