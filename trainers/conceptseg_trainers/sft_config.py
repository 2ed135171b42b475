"""The settings of stage I."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

COMPLETION_SOURCES = ("ground_truth", "template", "released", "generated")


@dataclass
class ConceptSFTConfig(TrainingArguments):
    """Stage I of the paper: supervised fine-tuning of the Concept Translation Module on L_seg (eq. 5).

    The fields of `transformers.TrainingArguments`, with the defaults of Table 7 (20 epochs at 3e-5, linear,
    AdamW, seed 42; batch 128 on 8 GPUs), and these:

    > Parameters that control the completions

        completion_source: Where the completions come from that the CTM reads. `"ground_truth"`: the sample's
            reasoning, rule, boxes and answer; of a sample that lacks one of these, the template. `"template"`: its
            boxes and answer (or prompt), with empty reasoning and rule. `"generated"`: the frozen VLM's own, written
            once and kept in `completion_dir`. `"released"`: what the released code does, the target's box between
            blank tags, and to SAM 3 the word "visual". The paper does not say.
        completion_dir: Folder of the generated completions; `<output_dir>/completions` by default. Runs of
            one model may share it, whatever their data.
        generation_batch_size: Prompts at a time while completions are generated.
        max_prompt_length: Tokens of a prompt, images included (Table 7); a longer one is refused.
        max_completion_length: Tokens of a completion (Table 7); longer ones are cut when generated, else
            refused.

    > Parameters that control the data

        shuffle_references: Compose the references at random, anew in each epoch, as in stage II (see
            `compose_references`). Generated completions belong to one mosaic, so theirs stays as it is.
        grid: Cells per side of that mosaic, K.

    > Parameters that control the loss

        dice_weight: Weight of the dice loss.
        focal_weight: Weight of the focal loss.
        focal_alpha: Its weight of foreground pixels; negative: none.
        focal_gamma: Its discount of well-classified pixels. `focal_alpha=-1, focal_gamma=0` is the released
            code's binary cross-entropy.

    > Parameters that control the example pictures

        log_examples: Pictures at a time; 0 for none.
        log_examples_steps: Steps between pictures of training batches; evaluations have theirs in any case.
    """

    # Table 7; batch: 8 GPUs x 16 = 128.
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=20, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Samples per device and step."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    # Every step uses every weight of the CTM, and nothing changes a buffer.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As in Trainer."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "As in Trainer."})
    # A sample is an object, not a row of columns.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false."})

    completion_source: str = field(
        default="ground_truth",
        metadata={"help": "Where completions come from.", "choices": list(COMPLETION_SOURCES)},
    )
    completion_dir: str | None = field(default=None, metadata={"help": "Folder of generated completions."})
    generation_batch_size: int = field(default=16, metadata={"help": "Prompts at a time while generating."})
    max_prompt_length: int = field(default=2048, metadata={"help": "Tokens of a prompt; longer is refused."})
    max_completion_length: int = field(default=768, metadata={"help": "Tokens of a completion."})
    shuffle_references: bool = field(
        default=True, metadata={"help": "Compose the references at random in each epoch."}
    )
    grid: int = field(default=2, metadata={"help": "Cells per side of the mosaic of references."})
    dice_weight: float = field(default=1.0, metadata={"help": "Weight of the dice loss."})
    focal_weight: float = field(default=1.0, metadata={"help": "Weight of the focal loss."})
    focal_alpha: float = field(default=0.25, metadata={"help": "Focal loss: weight of the foreground."})
    focal_gamma: float = field(default=2.0, metadata={"help": "Focal loss: discount of easy pixels."})
    log_examples: int = field(default=4, metadata={"help": "Example pictures at a time; 0 for none."})
    log_examples_steps: int = field(default=500, metadata={"help": "Steps between example pictures."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.completion_source not in COMPLETION_SOURCES:
            raise ValueError(
                f"ConceptSFTConfig: completion_source is {self.completion_source!r}; use one of "
                f"{', '.join(COMPLETION_SOURCES)}."
            )
        for name in ("generation_batch_size", "max_prompt_length", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"ConceptSFTConfig: {name} is {getattr(self, name)}; use at least 1.")
        for name in ("dice_weight", "focal_weight", "focal_gamma", "log_examples", "log_examples_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"ConceptSFTConfig: {name} is {getattr(self, name)}; use 0 or more.")
        if self.grid not in (1, 2, 3):
            raise ValueError(f"ConceptSFTConfig: grid is {self.grid}; use 1, 2 or 3 cells per side.")
        if self.gradient_checkpointing:
            raise ValueError(
                "ConceptSFTConfig: gradient_checkpointing is true, but the VLM is frozen and keeps no activations; "
                "leave it out."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "ConceptSFTConfig: remove_unused_columns is true, but samples have no columns; leave it out."
            )
