"""Recipes: the YAML files that are shipped, and how one of them and the command line fill the settings of a script."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from conceptseg_hf.cli.suggestions import suggest, unknown_option
from conceptseg_hf.errors import one_line
from conceptseg_hf.progress import is_terminal
from conceptseg_hf.shipped import find_shipped_folder
from conceptseg_hf.suggestions import did_you_mean

_recipes = find_shipped_folder("recipes", "conceptseg_trainers")
assert _recipes is not None  # the package is this one
FOLDER = _recipes


def recipe_names(stage: str = "") -> list[str]:
    """The names of the recipes that are shipped: of a stage, `"sft"` or `"meta_grpo"`, or of both."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if stage in path.stem)


def find_recipe(name: str, stage: str = "") -> Path:
    """The file of a recipe.

    Args:
        name: A file, or the name of a recipe that is shipped.
        stage: See `recipe_names`; for the message.

    Raises:
        ValueError: If there is none.
    """
    names = recipe_names(stage)
    if name and Path(name).is_file():
        return Path(name)
    if name.removesuffix(".yaml") in recipe_names():
        return FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    raise ValueError(
        f"--config {name!r} is not a file, nor the name of a recipe{did_you_mean(Path(name).stem, names)}; give a YAML "
        f"file, or one of {', '.join(names)}."
    )


class RecipeParser(TrlParser):
    """A TrlParser (YAML by `--config`, the command line beats it) that explains what is wrong in one sentence.

    Args:
        dataclass_types: What is filled.
        stage: See `recipe_names`.
        **kwargs: As of TrlParser.
    """

    def __init__(self, dataclass_types: Sequence[type], stage: str, **kwargs: Any) -> None:
        super().__init__(dataclass_types, **kwargs)  # type: ignore[arg-type]  # a NewType of Any takes no class
        self.stage = stage

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, filled.

        Raises:
            ValueError: If the recipe is missing or malformed, or an option or its value is unknown.
        """
        words = [part for word in argv for part in _split_config(word)]
        if not is_terminal():  # else Transformers decides
            self.set_defaults_with_config(disable_tqdm=True)
        if "--config" in words:
            position = words.index("--config")
            name = "".join(words[position + 1 : position + 2])
            del words[position : position + 2]
            self._take_recipe(find_recipe(name, self.stage))
        if (unknown := unknown_option(words, self)) is not None:
            self.error(f"unrecognized arguments: {unknown}")
        *outputs, rest = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return tuple(outputs)

    def error(self, message: str) -> NoReturn:
        """What argparse calls for bad options."""
        raise ValueError(f"{suggest(message.rstrip('.'), self)}; see --help for the options.")

    def _take_recipe(self, path: Path) -> None:
        """Makes what a recipe says the default."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = one_line(error)
            raise ValueError(f"the recipe {str(path)!r} is not valid YAML ({reason}); correct it.") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"the recipe {str(path)!r} is no YAML mapping; write a field and its value a line."
            )
        for name, value in (content.pop("env", None) or {}).items():  # as TRL has it
            os.environ[name] = str(value)
        fields = {action.dest for action in self._actions}
        aliases = {
            option.lstrip("-"): action.dest for action in self._actions for option in action.option_strings
        }
        content = {aliases.get(name, name): value for name, value in content.items()}
        own = recipe_names(self.stage)
        for name in content:
            if name not in fields:
                meant = did_you_mean(str(name), fields)
                if path.stem in recipe_names() and path.stem not in own:
                    meant = f" (this is a recipe of the other stage; those of this one are {', '.join(own)})"
                raise ValueError(
                    f"the recipe {str(path)!r} sets {name!r}, which {self.prog} does not know{meant}; correct its "
                    "name, or leave it out."
                )
        self.set_defaults_with_config(**content)


def _split_config(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]
