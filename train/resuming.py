"""What a resumed run keeps of its settings, and which of the options given with --resume it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from runtime.errors import FileError, OptionError
from train.checkpoint import Checkpoint
from train.data import splits
from train.data.folders import Reading
from train.data.names import NAMED, data_name, is_folder, place_of
from train.data.splits import SPLIT_NAME, Split
from train.recipe import Recipe

# They say how to run, not what: each time they may be others.
_FREE = ("resume", "data_root", "device", "workers", "strict", "memory_gib", "list_recipes")

_NAMES = {"layer_bits": "bits_file"}


def with_options(checkpoint: Checkpoint, given: Mapping[str, Any], folder: Path) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint that a resumed run goes on from, and a line for every option that it does not take.

    More epochs are taken, and another place of the run's image folder.

    Args:
        checkpoint: of the run.
        given: what is given on the command line, by name of the option, or of the field of QuantSpec.
        folder: of the run.

    Raises:
        OptionError: `data` is another data set than the run's.
    """
    recipe, notes = checkpoint.recipe, []
    own = asdict(checkpoint.quant) | asdict(recipe) | {"arch": checkpoint.arch["name"], "name": folder.name}
    for option, value in given.items():
        named = f"--{'no-' if value is False else ''}{_NAMES.get(option, option).replace('_', '-')}"
        named += "" if isinstance(value, bool) else f" {value}"
        if option in _FREE or (option in own and own[option] == value):
            continue
        if option == "runs" and Path(value).resolve() == folder.resolve().parent:
            continue
        if option == "epochs" and value > recipe.epochs:
            notes.append(
                f"{named}: the run had {recipe.epochs} to go; its schedule is that of {value} from here on"
            )
            recipe = replace(recipe, epochs=value)
        elif option == "data":
            if not (is_folder(value) and is_folder(recipe.data)):
                raise OptionError(f"{named}: the run trains on {recipe.data}; leave it out, or start another run")
            recipe = replace(recipe, data=value)
        else:
            keeps = f"the run keeps {own[option]!r}" if option in own else "the run goes on as it began"
            notes.append(f"{named}: not taken with --resume; {keeps}")
    return replace(checkpoint, recipe=recipe), notes


def located(split: Split, data: str, moved_to: str | None, root: str | Path) -> Split:
    """Return the split of a run with its image folder where that is now.

    Args:
        split: as it lies in the run's folder.
        data: name of the run's data set.
        moved_to: name of the data set with another place of its images; None where nobody gives one. A named data
            set is then looked for below `root`, if it is no longer at the split's place.
        root: folder below which a named data set lies.

    Raises:
        FileError: a named data set is not there.
    """
    if moved_to is None and (data not in NAMED or Path(split.root).is_dir()):
        return split
    name = moved_to or data
    return replace(split, data=data_name(name, ""), root=str(place_of(name, root).resolve()))


def reading_of(recipe: Recipe, run: Path | None) -> Reading:
    """Return how a recipe reads its folder: with the split written into its run's folder, once there is one.

    Raises:
        FileError: the run's split is gone, or is not the one the checkpoint was trained on.
    """
    split = None
    if run is not None and recipe.split:
        split = splits.read(run / SPLIT_NAME)
        if split.digest != recipe.split:
            raise FileError(
                f"{run / SPLIT_NAME}: split {split.digest}, expected the checkpoint's {recipe.split}; restore it"
            )
    return Reading(recipe.image_size, recipe.split_seed, recipe.test_share, split=split)
