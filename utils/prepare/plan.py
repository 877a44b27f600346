"""How to split the images of a table: the plan, and the part that it gives each image."""

from collections.abc import Sequence

import numpy as np

from utils.choices import SPLITS
from utils.prepare.records import Record, check_splits
from utils.prepare.splitting import divide
from utils.runtime.errors import UserError
from utils.runtime.text import count, list_names, print_line

LARGEST_SEED = 2**32 - 1  # that scikit-learn takes
VAL, TEST, SEED = 0.1, 0.1, 0


def make_plan(
    column: str | None, val: float | None, test: float | None, seed: int | None, folds: int | None
) -> dict[str, object]:
    """How to split, as JSON values. Raises UserError for contradictions."""
    if column is not None:
        given = {"--val": val, "--test": test, "--seed": seed, "--folds": folds}
        if conflict := [flag for flag, value in given.items() if value is not None]:
            raise UserError(f"--split {column}: takes the split from the table; leave out {', '.join(conflict)}.")
        return {"column": column}
    test, seed = TEST if test is None else test, SEED if seed is None else seed
    if seed > LARGEST_SEED:
        raise UserError(f"--seed {seed}: expected at most {LARGEST_SEED}.")
    if folds is not None:
        if val is not None:
            raise UserError("--val: the folds are the val splits; leave it out, or --folds.")
        if not 2 <= folds <= 100:
            raise UserError(f"--folds {folds}: expected 2 to 100.")
        shares = {f"fold_{k}": (1 - test) / folds for k in range(folds)} | {"test": test}
    else:
        val = VAL if val is None else val
        shares = {"train": round(1 - val - test, 9), "val": val, "test": test}
    if min(shares.values()) < 0 or next(iter(shares.values())) <= 0:
        raise UserError(f"--val and --test: {(val or 0) + test:g} together leave nothing for train; give less.")
    return {"shares": {name: share for name, share in shares.items() if share}, "seed": seed}


def divide_records(
    records: Sequence[Record], plan: dict, classes: list[str], grouped: bool
) -> tuple[list[str], np.ndarray]:
    """Names of the parts of the images, splits or folds and test, and the part of each image, (N,)."""
    if "column" in plan:
        check_splits(records, classes, grouped)
        return list(SPLITS), np.array([SPLITS.index(record.split) for record in records])
    parts, shares = list(plan["shares"]), list(plan["shares"].values())
    number_of = {name: number for number, name in enumerate(classes)}
    labels = np.array([number_of[record.label] for record in records])
    groups = None
    if grouped:
        numbers = {name: number for number, name in enumerate(sorted({record.group for record in records}))}
        groups = np.array([numbers[record.group] for record in records])
        print_line(f"Splitting {count(len(numbers), 'group')} with {count(len(records), 'image')}.")
    _check_classes(labels, groups, parts, classes)
    part = divide(labels, groups, shares, plan["seed"])
    found = np.zeros((len(parts), len(classes)), np.int64)
    np.add.at(found, (part, labels), 1)
    needed = found[[number for number, name in enumerate(parts) if name != "test"]]
    if lacking := [classes[label] for label in np.flatnonzero((needed == 0).any(axis=0))]:
        raise UserError(
            f"no split found with every class in train and val; lacking: {list_names(lacking)}. Give another --seed, "
            "or merge or remove these classes."
        )
    exact = np.outer(shares, np.bincount(labels))
    row, column = np.unravel_index(np.abs(found - exact).argmax(), exact.shape)
    print_line(
        f"Largest difference from the shares: {parts[row]} has {found[row, column]} images of {classes[column]}, where "
        f"its share is {exact[row, column]:.1f}."
    )
    return parts, part


def _check_classes(labels: np.ndarray, groups: np.ndarray | None, parts: list[str], classes: list[str]) -> None:
    """Raise UserError for classes with too few images or groups for train and val, and warn of those without test."""
    noun, units = ("image", np.arange(len(labels))) if groups is None else ("group", groups)
    holders = np.bincount(np.unique(np.stack([labels, units]), axis=1)[0])
    needed = len([name for name in parts if name != "test"])
    place = "each of train and val" if parts[0] == "train" else "each fold"
    if few := [f"{classes[label]} ({holders[label]})" for label in np.flatnonzero(holders < needed)]:
        advice = "" if parts[0] == "train" else f", or give at most --folds {max(2, holders.min())}"
        raise UserError(
            f"{count(len(few), 'class')} with fewer than {count(needed, noun)}: {list_names(few)}; {place} needs one. "
            f"Merge or remove them{advice}."
        )
    if "test" in parts and (few := [classes[label] for label in np.flatnonzero(holders == needed)]):
        print_line(
            f"warning: {count(len(few), 'class')} with only {count(needed, noun)}: {list_names(few)}; test lacks them."
        )
