"""Settings of stage I."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

COMPLETION_SOURCES = ("ground_truth", "template", "released", "generated")


@dataclass
class ConceptSFTConfig(TrainingArguments):
    """Stage I of the paper: supervised fine-tuning of the Concept Translation Module on L_seg (eq. 5).

    This class includes all fields of `transformers.TrainingArguments`, with the defaults of Table 7 (20 epochs,
    learning rate 3e-5, linear schedule, AdamW, seed 42, batch size 128 on 8 GPUs), and the fields below.

    > Parameters that control the completions

        completion_source: Source of the completions that the CTM reads; the paper does not specify it.
            `"ground_truth"`: the sample's reasoning, rule, boxes and answer, or the template if one of the texts is
            missing. `"template"`: the sample's boxes and answer (or prompt), with empty reasoning and rule.
            `"generated"`: completions of the frozen VLM, generated once and cached in `completion_dir`.
            `"released"`: as in the released code, the target box between blank tags, with "visual" as the text prompt
            of SAM 3.
        completion_dir: Folder of the generated completions; `<output_dir>/completions` by default. Runs with the same
            model may share a folder, even with different datasets.
        generation_batch_size: Batch size for generating completions.
        max_prompt_length: Maximum number of tokens of a prompt, including image tokens (Table 7); longer prompts raise
            an error.
        max_completion_length: Maximum number of tokens of a completion (Table 7); longer ones are truncated if they are
            generated, and raise an error otherwise.

    > Parameters that control the data

        shuffle_references: Compose the references at random in each epoch, as in stage II (see `compose_references`).
            Has no effect on generated completions, each of which belongs to one mosaic.
        grid: Number of cells per side of the mosaic, K.

    > Parameters that control the loss

        dice_weight: Weight of the dice loss.
        focal_weight: Weight of the focal loss.
        focal_alpha: Weight of foreground pixels in the focal loss; a negative value disables the weighting.
        focal_gamma: Focusing parameter of the focal loss. `focal_alpha=-1, focal_gamma=0` is the binary cross-entropy
            of the released code.

    > Parameters that control the example images

        log_examples: Number of example images per log; 0 disables them.
        log_examples_steps: Number of steps between example images of training batches. Evaluations always log theirs.
    """

    # Table 7; batch: 8 GPUs x 16 = 128.
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=20, metadata={"help": "Number of training epochs."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    # Every step uses all weights of the CTM, and no buffer changes.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As in Trainer."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "As in Trainer."})
    # A sample is an object, not a row of columns.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false."})

    completion_source: str = field(
        default="ground_truth",
        metadata={"help": "Source of the completions.", "choices": list(COMPLETION_SOURCES)},
    )
    completion_dir: str | None = field(default=None, metadata={"help": "Folder of generated completions."})
    generation_batch_size: int = field(
        default=16, metadata={"help": "Batch size for generating completions."}
    )
    max_prompt_length: int = field(default=2048, metadata={"help": "Maximum tokens of a prompt."})
    max_completion_length: int = field(default=768, metadata={"help": "Maximum tokens of a completion."})
    shuffle_references: bool = field(
        default=True, metadata={"help": "Compose the references at random in each epoch."}
    )
    grid: int = field(default=2, metadata={"help": "Cells per side of the reference mosaic."})
    dice_weight: float = field(default=1.0, metadata={"help": "Weight of the dice loss."})
    focal_weight: float = field(default=1.0, metadata={"help": "Weight of the focal loss."})
    focal_alpha: float = field(default=0.25, metadata={"help": "Foreground weight of the focal loss."})
    focal_gamma: float = field(default=2.0, metadata={"help": "Focusing parameter of the focal loss."})
    log_examples: int = field(default=4, metadata={"help": "Example images per log; 0 for none."})
    log_examples_steps: int = field(default=500, metadata={"help": "Steps between example images."})

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
                "ConceptSFTConfig: gradient_checkpointing is true, but the VLM is frozen and stores no activations; "
                "remove it."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "ConceptSFTConfig: remove_unused_columns is true, but samples have no columns; remove it."
            )
