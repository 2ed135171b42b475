"""Recipes: the YAML files shipped with the package, and a parser that merges a recipe with the command line."""

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
assert _recipes is not None  # the folder belongs to this package
FOLDER = _recipes


def recipe_names(stage: str = "") -> list[str]:
    """Return the names of the shipped recipes of a stage, `"sft"` or `"meta_grpo"`, or of both stages by default."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if stage in path.stem)


def find_recipe(name: str, stage: str = "") -> Path:
    """Return the path of a recipe.

    Args:
        name: Path of a file, or name of a shipped recipe.
        stage: See `recipe_names`; used for the error message.

    Raises:
        ValueError: If there is no such file or recipe.
    """
    names = recipe_names(stage)
    if name and Path(name).is_file():
        return Path(name)
    if name.removesuffix(".yaml") in recipe_names():
        return FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    raise ValueError(
        f"--config {name!r} is neither a file nor the name of a recipe{did_you_mean(Path(name).stem, names)}; use a "
        f"YAML file, or one of {', '.join(names)}."
    )


class RecipeParser(TrlParser):
    """A TrlParser (YAML from `--config`, overridden by the command line) with one-sentence error messages.

    Args:
        dataclass_types: Dataclasses to fill.
        stage: See `recipe_names`.
        **kwargs: Further arguments of TrlParser.
    """

    def __init__(self, dataclass_types: Sequence[type], stage: str, **kwargs: Any) -> None:
        super().__init__(dataclass_types, **kwargs)  # type: ignore[arg-type]  # NewType of Any
        self.stage = stage

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Parse the command line, and the recipe that it names, into instances of the dataclasses.

        Raises:
            ValueError: If the recipe is missing or malformed, or an option or its value is unknown.
        """
        arguments = [part for argument in argv for part in _split_config(argument)]
        if not is_terminal():  # otherwise keep the default of Transformers
            self.set_defaults_with_config(disable_tqdm=True)
        if "--config" in arguments:
            position = arguments.index("--config")
            name = "".join(arguments[position + 1 : position + 2])
            del arguments[position : position + 2]
            self._apply_recipe(find_recipe(name, self.stage))
        if (unknown := unknown_option(arguments, self)) is not None:
            self.error(f"unrecognized arguments: {unknown}")
        *outputs, rest = self.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return tuple(outputs)

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError; argparse calls this method for invalid options."""
        raise ValueError(f"{suggest(message.rstrip('.'), self)}; see --help for the options.")

    def _apply_recipe(self, path: Path) -> None:
        """Use the values of a recipe as defaults."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = one_line(error)
            raise ValueError(f"the recipe {str(path)!r} is not valid YAML ({reason}); correct it.") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"the recipe {str(path)!r} is not a YAML mapping; write one `field: value` per line."
            )
        for name, value in (content.pop("env", None) or {}).items():  # as in TRL
            os.environ[name] = str(value)
        fields = {action.dest for action in self._actions}
        aliases = {
            option.lstrip("-"): action.dest for action in self._actions for option in action.option_strings
        }
        content = {aliases.get(name, name): value for name, value in content.items()}
        names = recipe_names(self.stage)
        for name in content:
            if name not in fields:
                hint = did_you_mean(str(name), fields)
                if path.stem in recipe_names() and path.stem not in names:
                    hint = f" (this is a recipe of another stage; the recipes of this one are {', '.join(names)})"
                raise ValueError(
                    f"the recipe {str(path)!r} sets {name!r}, which is not a field of {self.prog}{hint}; correct its "
                    "name, or remove it."
                )
        self.set_defaults_with_config(**content)


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]
