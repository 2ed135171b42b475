"""Training scripts: `python -m conceptseg_trainers.scripts.sft --config RECIPE` and `.meta_grpo`.

`conceptseg train` runs the same code; with torchrun or `accelerate launch`, use the module name.
"""

import logging

# PEFT always imports bitsandbytes. This logger only warns that an optional kernel for 4-bit layers on CPUs is not
# installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
