"""Saving and uploading of a composite model, and its processor, which is saved in the same folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from . import hub
from .devices import is_offloaded, stored_value
from .errors import first_line

_PROCESSOR_ARGUMENTS = ("cache_dir", "local_files_only", "token", "revision", "subfolder")


class ModelFolderMixin(PreTrainedModel):
    """Save and upload a model, and find its processor.

    Attributes:
        processor_class: Class of the processor.
    """

    config: Any
    processor_class: Any
    _processor: Any = None
    _processor_arguments: Mapping[str, Any] = {}

    def keep_processor_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Keep the arguments of `from_pretrained` with which the processor is loaded on first access."""
        self._processor_arguments = {
            name: arguments[name] for name in _PROCESSOR_ARGUMENTS if name in arguments
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        save_original_format: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model, by default with the keys of `state_dict()`, which trainers need to resume.

        A model card is written to the folder if it has none (see `cards.save_model_card`).

        Args:
            save_directory: Output folder.
            *args: See the base class.
            save_original_format: Use the weight names of the original backbone checkpoints.
            push_to_hub: Also upload the folder.
            **kwargs: See the base class; with `push_to_hub` also `repo_id` (defaults to the folder's name) and the
                arguments of `hub.upload`.
        """
        if push_to_hub:
            upload, kwargs = hub.split_upload_arguments(save_directory, kwargs)
        if is_offloaded(self) and not hasattr(self, "hf_device_map") and len(args) < 2:
            kwargs.setdefault(
                "state_dict", self._stored_state_dict()
            )  # the base class handles the other cases
        kwargs["save_original_format"] = save_original_format
        super().save_pretrained(save_directory, *args, **kwargs)
        if Path(save_directory).is_dir():  # non-main processes may not have the folder
            hub.keep_remote_stub(save_directory)
            hub.save_model_card(save_directory, self.config, tags=self.model_tags or ())
        if push_to_hub:
            hub.upload(save_directory, **upload)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        report: Any = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> Any:
        """Upload the model and its card.

        A card that already exists in the repository is kept unless `report` is given; see `cards.merge_cards`.

        Args:
            repo_id: Repository id; the repository is created if it does not exist.
            report: Evaluation report to include in the card; see `cards.save_model_card`.
            max_shard_size: Maximum size of each weight file.
            **kwargs: Additional arguments of `hub.upload`.

        Returns:
            The commit information returned by the Hub.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if report is not None:
                hub.save_model_card(
                    folder, self.config, report=report, overwrite=True, tags=self.model_tags or ()
                )
            return hub.upload(folder, repo_id, keep_card=report is None, **kwargs)

    def _stored_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict including the values of offloaded weights; tied weights are included once."""
        return {
            name: stored_value(self, name) if value.is_meta else value
            for name, value in self.state_dict().items()
            if name not in self.all_tied_weights_keys
        }

    @property
    def processor(self) -> Any:
        """The processor saved in the checkpoint of this model, loaded on first access; it can also be assigned.

        Raises:
            ValueError: If no processor is available.
        """
        if self._processor is None:
            source = self.config.name_or_path
            remedy = "pass processor=..., or save a processor in the checkpoint"
            if not source:
                raise ValueError(
                    f"segment: this model was not loaded from a checkpoint with a processor; {remedy}."
                )
            try:
                self._processor = self.processor_class.from_pretrained(source, **self._processor_arguments)
            except (OSError, ValueError) as error:
                reason = first_line(error)
                raise ValueError(
                    f"segment: cannot load a processor from {source!r} ({reason}); {remedy}."
                ) from error
        return self._processor

    @processor.setter
    def processor(self, value: Any) -> None:
        self._processor = value
