"""Arguments for training LoRA adapters instead of the full VLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import LoraConfig

from conceptseg_hf.vlm_families import VlmFamily


@dataclass
class AdapterArguments:
    """Arguments for LoRA adapters of the VLM; the other trained modules are trained in full.

    Attributes:
        use_peft: Train LoRA adapters of the VLM.
        lora_r: Rank of the adapters.
        lora_alpha: Alpha of the adapters (their scale times the rank).
        lora_dropout: Dropout of the adapters.
        lora_target_modules: Regular expression for the names of the modules that get adapters; the attention
            projections of the language model by default.
    """

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the VLM."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters times the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters."})
    lora_target_modules: str | None = field(
        default=None, metadata={"help": "Modules that get adapters (regex)."}
    )

    def peft_config(self, family: VlmFamily, modules_to_save: Sequence[str]) -> LoraConfig | None:
        """Return the configuration of the adapters, or None without `use_peft`.

        Args:
            family: Family of the VLM.
            modules_to_save: Names of the modules that are trained in full.
        """
        if not self.use_peft:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or family.lora_target_modules,
            modules_to_save=list(modules_to_save),
        )
