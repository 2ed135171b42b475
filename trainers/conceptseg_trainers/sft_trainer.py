"""Stage I: train the Concept Translation Module (CTM) with a frozen VLM and a frozen SAM 3 (eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegOutput, ConceptSegProcessor
from conceptseg_hf.data import ConceptSample
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.images import load_image, load_mask
from conceptseg_hf.losses import segmentation_loss
from conceptseg_hf.processing_conceptseg import PreparedSample

from .callbacks import EpochCallback, ExampleImagesCallback, TrainingExample
from .cards import as_list, write_training_card
from .checkpoints import run_folder
from .completions import (
    CompletionCache,
    TrainingCompletion,
    check_sample_texts,
    ground_truth_completion,
    released_completion,
    resolve_completion_source,
    template_completion,
)
from .distributed import is_sharded
from .divergence import DivergenceCheckTrainer, FiniteLogs
from .samples import ReadableSamples, check_arguments, check_prompt_length, check_sample, spread_indices
from .sft_config import ConceptSFTConfig
from .split_reference import compose_references


class ConceptSFTTrainer(DivergenceCheckTrainer):
    """A Trainer that only wraps, shards and checkpoints the parameters of the CTM.

    Checkpoints of a run contain only `ctm.*`; `save_model()` writes the complete model and its processor, which
    `ConceptSegForSegmentation.from_pretrained` and stage II load. Masks are compared at the resolution of their images.
    Metrics logged in addition to the loss: `loss/dice`, `loss/focal` and `mask_iou`, the mean foreground IoU. A
    training that diverges raises a `DivergedError`.

    Args:
        model: The model; every process holds the full VLM and SAM 3.
        args: The settings.
        train_dataset: Samples that can be indexed, such as the result of `load_benchmark`; unreadable samples are
            replaced by the next one.
        eval_dataset: Samples for evaluation; their references are not composed at random.
        processing_class: The model's processor.
        callbacks: Additional callbacks.
        optimizers: As in `Trainer`.

    Attributes:
        concept_model: The model.
        examples: The examples that `ExampleImagesCallback` draws next.

    Raises:
        ValueError: If model, processor or data cannot be used.
    """

    # The loss is the mean of its batch, so the Trainer must divide it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    args: ConceptSFTConfig
    processing_class: ConceptSegProcessor
    data_collator: ConceptSFTCollator
    train_dataset: ReadableSamples
    eval_dataset: ReadableSamples | None

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        args: ConceptSFTConfig,
        train_dataset: Sequence[ConceptSample],
        eval_dataset: Sequence[ConceptSample] | None = None,
        processing_class: ConceptSegProcessor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        processor = _check_arguments(model, args, train_dataset, processing_class)
        resolve_completion_source(train_dataset, args)
        check = partial(check_sample_texts, processor=processor, source=args.completion_source)
        train_dataset = ReadableSamples(train_dataset, check)
        eval_dataset = None if eval_dataset is None else ReadableSamples(eval_dataset, check)
        collator = ConceptSFTCollator(processor, args, end_of_turn=model.config.end_of_turn_state)
        for samples in (train_dataset, eval_dataset or ()):
            _check_samples(samples, collator)
        self.concept_model = model.requires_grad_(False).eval()
        model.ctm.requires_grad_(True)
        config_fields = set(vars(model.config))
        super().__init__(
            model=_TrainedPart(model),
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=_mean_iou,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for name in set(vars(model.config)) - config_fields:  # e.g. `use_cache`, which the Trainer sets
            delattr(model.config, name)
        model.to(args.device)  # type: ignore[arg-type]  # the wrapper in Transformers has no signature
        self.examples: list[TrainingExample] = []
        self._metrics: list[Tensor] = []
        self._saves_everything = False
        if args.log_examples:
            self.add_callback(ExampleImagesCallback(self, args.log_examples_steps, args.log_examples))
        self.add_callback(EpochCallback(collator.set_epoch))
        self.add_callback(FiniteLogs())
        if args.completion_source == "generated":
            collator.cache = self._generated_completions()

    def _generated_completions(self) -> CompletionCache:
        folder = Path(self.args.completion_dir or Path(run_folder(self.args)) / "completions")
        limit = self.args.max_completion_length
        cache = CompletionCache(folder, self.concept_model, self.processing_class, limit)
        for samples in (self.train_dataset, self.eval_dataset or ()):
            cache.generate(
                self.concept_model,
                samples,
                self.args.generation_batch_size,
                self.args.process_index,
                self.args.world_size,
            )
        self.accelerator.wait_for_everyone()
        cache.reload()
        return cache

    # -- steps --

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, list[np.ndarray]]:
        """Return L_seg, the mean over the rows, and with `return_outputs` the predicted masks, (H, W) bool."""
        inputs = dict(inputs)
        examples, labels, ignored = (inputs.pop(name) for name in ("shown", "mask_labels", "ignored"))
        logits = model(**inputs).mask_logits
        full_size = [
            nn.functional.interpolate(
                row[None].float(), size=label.shape, mode="bilinear", align_corners=False
            )
            for row, label in zip(logits, labels, strict=True)
        ]
        parts = [
            segmentation_loss(
                row,
                label[None],
                self.args.focal_alpha,
                self.args.focal_gamma,
                None if ignore is None else ignore[None],
            )[1:]
            for row, label, ignore in zip(full_size, labels, ignored, strict=True)
        ]
        dice, focal = (torch.stack(part).mean() for part in zip(*parts, strict=True))
        loss = self.args.dice_weight * dice + self.args.focal_weight * focal
        self.check_loss(loss)

        masks = [(row[0, 0] > 0).cpu().numpy() for row in full_size]
        if model.training:
            iou = np.mean(_ious(masks, labels, ignored))
            self._metrics.append(torch.stack([dice.detach(), focal.detach(), dice.new_tensor(iou)]))
            every = self.args.log_examples_steps
            if every and (self.state.global_step + 1) % every == 0:
                self.examples = _with_masks(examples, masks, labels, ignored)
        return (loss, masks) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the loss and the foreground IoU of each row (twice, as the Trainer expects predictions and labels)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, masks = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        ground_truth = inputs["mask_labels"], inputs["ignored"]
        examples = _with_masks(inputs["shown"], masks, *ground_truth)
        self.examples += examples[: self.args.log_examples - len(self.examples)]
        ious = torch.tensor(_ious(masks, *ground_truth), device=loss.device)
        return loss.detach(), ious, ious

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the evaluation loop of the Trainer and collect new examples."""
        self.examples = []
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the metrics over all processes and over the steps since the last log."""
        if "loss" in logs and self._metrics:
            means = self.accelerator.reduce(torch.stack(self._metrics).mean(0), "mean").tolist()
            logs |= dict(zip(("loss/dice", "loss/focal", "mask_iou"), means, strict=True))
            self._metrics.clear()
        super().log(logs, start_time)

    # -- data --

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Return the evaluation dataloader, in which references are not composed at random."""
        training_collator = self.data_collator
        self.data_collator = replace(training_collator, shuffle=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    # -- saving --

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        *args: Any,
        dataset: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write our model card, which names the license of SAM 3, to `output_dir`.

        Args:
            language: Language of the prompts.
            license: License of the checkpoint; overridden by the license of SAM 3 if its released weights are included.
            tags: Additional tags.
            *args: Further arguments of `Trainer.create_model_card`; ignored.
            dataset: Hub ids of the datasets.
            **kwargs: Further arguments of `Trainer.create_model_card`; ignored.
        """
        if self.is_world_process_zero():
            self._write_card(
                run_folder(self.args), tags, language=language, license=license, datasets=as_list(dataset)
            )

    def _write_card(self, folder: str, tags: str | list[str] | None = None, **metadata: Any) -> None:
        write_training_card(
            folder,
            self.concept_model.config,
            "Stage I: supervised fine-tuning of the Concept Translation Module; the VLM and SAM 3 are frozen.",
            as_list(tags),
            **metadata,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the complete model; internal calls of the Trainer, for checkpoints of a run, save only the CTM."""
        self._saves_everything = not _internal_call or output_dir is None  # without a folder: before a push
        super().save_model(output_dir, _internal_call)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise an error if the weights of a checkpoint do not match the CTM; the Trainer would only warn."""
        mismatched = [*load_result.missing_keys, *load_result.unexpected_keys]
        if mismatched:
            raise ValueError(
                f"the checkpoint does not match this CTM ({mismatched[0]} and {len(mismatched) - 1} other weights); "
                "resume from a stage I checkpoint of the same model."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self._saves_everything:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = output_dir or run_folder(self.args)
            # With sharding, `state_dict` contains the gathered weights of the CTM, and the model only its shards.
            trained = self.model.state_dict() if state_dict is None else state_dict
            self._write_card(folder)
            self.concept_model.save_pretrained(
                folder, state_dict={**self.concept_model.state_dict(), **trained}
            )
            self.processing_class.save_pretrained(folder)


class _TrainedPart(nn.Module):
    """The module for the Trainer: the forward pass of the full model, with only the parameters of the CTM.

    DDP, DeepSpeed and FSDP therefore move, shard and save only the CTM, as `ctm.*`. SAM 3 cannot be sharded, and the
    VLM must stay in eval mode.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: ConceptSegForSegmentation) -> None:
        super().__init__()
        self.ctm = model.ctm
        self.config = model.config
        self._model = (model,)  # a tuple, so that the model is not registered as a submodule

    def forward(self, **inputs: Any) -> ConceptSegOutput:
        """See `ConceptSegForSegmentation.forward`."""
        return self._model[0](**inputs)


@dataclass(eq=False)
class ConceptSFTCollator:
    """Collate samples to a batch: prompts with completions, images and text prompts of SAM 3, ground-truth masks.

    Random composition depends only on the seed, the epoch and the sample.

    Attributes:
        processor: The model's processor.
        args: The settings.
        cache: The generated completions, with `completion_source="generated"`.
        shuffle: Whether references may be composed at random.
        epoch: Index of the epoch.
        end_of_turn: Whether the CTM reads the hidden state of the end-of-turn token; see
            `ConceptSegConfig.end_of_turn_state`.
    """

    processor: ConceptSegProcessor
    args: ConceptSFTConfig
    cache: CompletionCache | None = None
    shuffle: bool = True
    epoch: int = 0
    end_of_turn: bool = False

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; must be called before its batches."""
        self.epoch = epoch

    def __call__(self, samples: Sequence[ConceptSample]) -> dict[str, Any]:
        """Collate a batch.

        Returns:
            The arguments of the model's forward; `mask_labels`, a list of (H, W) bool; `ignored`, a list of masks of
            pixels to ignore, or None; and `shown`, the first rows as examples without masks.
        """
        rows = [self.row(sample) for sample in samples]
        prepared, completions = zip(*rows, strict=True)
        ends = [self.end_of_turn and not completion.is_truncated for completion in completions]
        texts = [completion.text for completion in completions]
        batch = dict(self.processor.collate(prepared, texts, end_of_turn=ends))
        lengths = batch["completion_mask"].sum(1) - torch.tensor(ends).long()
        for sample, length in zip(samples, lengths.tolist(), strict=True):
            if length > self.args.max_completion_length:
                raise ValueError(
                    f"sample {sample.sample_id!r} has a completion of {length} tokens, more than "
                    f"max_completion_length = {self.args.max_completion_length}; increase it, or shorten the text."
                )
        sam_input_ids, sam_attention_mask = self.processor.sam_text(
            [completion.sam_text for completion in completions]
        )
        first_rows = list(zip(samples, prepared, completions))[: self.args.log_examples]
        return {
            **batch,
            "sam_pixel_values": torch.stack([item.sam_pixel_values for item in prepared]),
            "sam_input_ids": sam_input_ids,
            "sam_attention_mask": sam_attention_mask,
            "mask_labels": [torch.from_numpy(load_mask(sample.mask)) for sample in samples],
            "ignored": [
                None if sample.ignore is None else torch.from_numpy(load_mask(sample.ignore))
                for sample in samples
            ],
            "shown": [
                TrainingExample(
                    target=sample.image,
                    mosaic=item.vlm_images[0] if len(item.vlm_images) > 1 else None,
                    rule=completion.rule,
                    answer=completion.sam_text,
                )
                for sample, item, completion in first_rows
            ],
        }

    def row(self, sample: ConceptSample) -> tuple[PreparedSample, TrainingCompletion]:
        """Return the prompt and the completion of a sample.

        Raises:
            ValueError: If the sample cannot be used.
        """
        seeds, references = [self.args.seed, self.epoch], sample.references
        if self.shuffle and self.args.shuffle_references and self.args.completion_source != "generated":
            references = compose_references(references, self.args.grid, seeds, sample.sample_id)
        prepared = self.prepare(sample, references)
        frame = prepared.frame
        assert frame is not None  # None only for failed samples
        match self.args.completion_source:
            case "ground_truth":
                completion = ground_truth_completion(sample, frame, self.processor)
            case "template":
                completion = template_completion(sample, frame, self.processor)
            case "released":
                completion = released_completion(sample, frame, self.processor)
            case "generated":
                if self.cache is None:
                    raise ValueError(
                        "ConceptSFTCollator: completion_source is generated, but cache is None; pass the "
                        "CompletionCache of the completions."
                    )
                completion = self.cache.completion(sample)
        return prepared, completion

    def prepare(self, sample: ConceptSample, references: Sequence[Any]) -> PreparedSample:
        """Return the prompt of a sample.

        Raises:
            ValueError: If the sample has no mask of its image's size, or the prompt is too long.
        """
        check_sample(sample, load_image(sample.image).size)
        prepared = self.processor.prepare(sample.image, sample.prompt, references)
        check_prompt_length(f"sample {sample.sample_id!r}", prepared, self.args.max_prompt_length)
        return prepared


def _ious(
    masks: Sequence[np.ndarray], labels: Sequence[Tensor], ignored: Sequence[Tensor | None]
) -> list[float]:
    return [
        foreground_iou(mask, label.cpu().numpy(), None if ignore is None else ignore.cpu().numpy())
        for mask, label, ignore in zip(masks, labels, ignored, strict=True)
    ]


def _with_masks(
    examples: Sequence[TrainingExample],
    masks: Sequence[np.ndarray],
    labels: Sequence[Tensor],
    ignored: Sequence[Tensor | None],
) -> list[TrainingExample]:
    """Return the examples of a batch with their masks."""
    ious = _ious(masks, labels, ignored)
    return [
        replace(example, gt_mask=label.cpu().numpy(), predicted_mask=mask, rewards={"mask IoU": iou})
        for example, mask, label, iou in zip(examples, masks, labels, ious)
    ]


def _mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    return {"mask_iou": float(np.mean(prediction.predictions))}


def _check_arguments(
    model: ConceptSegForSegmentation,
    args: ConceptSFTConfig,
    train_dataset: Sequence[ConceptSample],
    processor: ConceptSegProcessor | None,
) -> ConceptSegProcessor:
    _, checked = check_arguments("ConceptSFTTrainer", model, args, ConceptSFTConfig, processor)
    if train_dataset is None or not len(train_dataset):
        raise ValueError("ConceptSFTTrainer: train_dataset has no samples; pass at least one.")
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "ConceptSFTTrainer: ZeRO-3 has sharded the model during loading, but stage I only shards the CTM; "
            "load the model before creating the ConceptSFTConfig, or use `conceptseg train sft`."
        )
    return checked


def _check_samples(samples: Sequence[ConceptSample], collator: ConceptSFTCollator) -> None:
    for index in spread_indices(len(samples)):
        sample = samples[index]
        if not isinstance(sample, ConceptSample):
            raise ValueError(
                f"ConceptSFTTrainer: sample {index} is a {type(sample).__name__}; pass ConceptSamples, "
                "such as those of load_benchmark."
            )
        if collator.args.completion_source == "generated":
            collator.prepare(sample, sample.references)
        else:
            collator([sample])


__all__ = ["ConceptSFTCollator", "ConceptSFTTrainer"]
