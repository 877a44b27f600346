"""How many altered copies the audit's search for near copies finds, and what else it takes for copies.

`python -m benchmarks.near_duplicates DATA` alters a sample of the images of DATA/{train,val,test}/<class>/<image>, and
prints the share of copies that are found for each alteration, the pairs of different images of DATA that count as near
copies, and the time and memory of a search among generated descriptors. --sheet draws such pairs, to be judged by eye.
"""

import io
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from utils.audit.__main__ import open_files
from utils.audit.duplicates import correlations, near_groups, near_pairs
from utils.audit.flags import BLANK_BELOW, CORRELATION
from utils.audit.images import FREQUENCIES, descriptor, measure_all
from utils.audit.rule import Census, take_census
from utils.data.images import read_image
from utils.flags import natural, positive_int
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.processes import run_script

THRESHOLDS = (0.97, 0.975, 0.98, 0.985, 0.99, 0.995)
SIDE, PER_ROW = 160, 6  # of the sheet: pixels of an image, pairs in a row
CENTRES = 1000  # kinds of generated descriptors

Alteration = Callable[[Image.Image], Image.Image]


def jpeg(quality: int, image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("L")


def resized(factor: float, image: Image.Image) -> Image.Image:
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)


def halved_and_doubled(image: Image.Image) -> Image.Image:
    return resized(0.5, image).resize(image.size, Image.Resampling.BICUBIC)


def levels(change: Callable[[np.ndarray], np.ndarray], image: Image.Image) -> Image.Image:
    """The image with each level v, 0 to 255, replaced by change(v), rounded and clipped."""
    table = np.clip(np.round(change(np.arange(256.0))), 0, 255).astype(np.uint8)
    return Image.fromarray(table[np.asarray(image)])


def noisy(deviation: float, image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    noise = np.random.default_rng(0).normal(0, deviation, pixels.shape)
    return Image.fromarray(np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8))


def cropped(share: float, image: Image.Image) -> Image.Image:
    """The image without its border; share: of its width and height, both sides together."""
    width, height = image.size
    left, top = round(width * share / 2), round(height * share / 2)
    return image.crop((left, top, width - left, height - top))


def with_text(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).text((3, 3), "R 12:30", fill=255)
    return image


ALTERATIONS: dict[str, Alteration] = {
    "grey saved as colour": lambda image: image.convert("RGB").convert("L"),
    "JPEG, quality 95": partial(jpeg, 95),
    "JPEG, quality 75": partial(jpeg, 75),
    "JPEG, quality 50": partial(jpeg, 50),
    "half the size": partial(resized, 0.5),
    "3/4 of the size": partial(resized, 0.75),
    "5/4 of the size": partial(resized, 1.25),
    "half the size and back": halved_and_doubled,
    "contrast x 1.2": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "contrast x 0.8": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "brightness x 1.2": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "brightness x 0.8": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "20 levels brighter": partial(levels, lambda level: level + 20),
    "20 levels darker": partial(levels, lambda level: level - 20),
    "gamma 0.8": partial(levels, lambda level: 255 * (level / 255) ** 0.8),
    "gamma 1.25": partial(levels, lambda level: 255 * (level / 255) ** 1.25),
    "noise of 3 levels": partial(noisy, 3),
    "noise of 8 levels": partial(noisy, 8),
    "window 25 to 200": partial(levels, lambda level: (level - 25) / 175 * 255),
    "text in a corner": with_text,
    "cropped by 2 %": partial(cropped, 0.02),
    "cropped by 5 %": partial(cropped, 0.05),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    files = open_files(options.data)
    measured = [measure_all(split, 0) for split in files]
    records = np.concatenate([split.records for split in measured])
    errors = [error for split in measured for error in split.errors]
    census = take_census(files, records, errors, BLANK_BELOW, CORRELATION)

    chosen = sample(census, options.images_per_class)
    images = [read_image(Path(census.path(index)), gray=True) for index in chosen]
    found = {name: found_copies(images, alter, CORRELATION) for name, alter in ALTERATIONS.items()}
    print(f"\nCopies found at a correlation of {CORRELATION:g} or more, of {len(images)} images\n")
    print_table("alteration | found | %", ([name, n, f"{100 * n / len(images):.0f}"] for name, n in found.items()))

    print(f"\nPairs among the {len(census.records)} images of {options.data}\n")
    pairs = compared_pairs(census, min(THRESHOLDS))
    rows = ([f"{least:g}", *count_pairs(census, pairs, least)] for least in THRESHOLDS)
    print_table("correlation of at least | pairs | across classes | across splits", rows)
    if options.sheet:
        draw_pairs(census, [pair for pair in pairs if pair[0] >= CORRELATION], options.sheet)
    if options.search:
        print(f"\n{timed_search(options.search)}")


def _parser() -> Parser:
    parser = Parser(__doc__, prog="python -m benchmarks.near_duplicates", show_defaults=True)
    add = parser.add_argument
    add("data", type=expanded_path, metavar="DATA", help="folder with {train,val,test}/<class>/<image>")
    add("--images-per-class", type=positive_int, default=6, help="images of each class to alter")
    add("--search", type=natural, default=0, metavar="N", help="also time a search among N generated descriptors")
    add("--sheet", type=expanded_path, metavar="FILE", help="PNG of the pairs that count as near copies")
    return parser


def sample(census: Census, per_class: int) -> list[int]:
    """Positions of random images of each class, of all splits together, without blank images."""
    rng = np.random.default_rng(0)
    usable = census.readable() & ~census.blank
    chosen = []
    for label in range(len(census.classes)):
        of_class = np.flatnonzero(usable & (census.label == label))
        chosen += rng.permutation(of_class)[:per_class].tolist()
    return chosen


def found_copies(images: list[Image.Image], alter: Alteration, correlation: float) -> int:
    """Number of images whose altered copy is in their group."""
    descriptors = np.stack([*map(descriptor, images), *(descriptor(alter(image)) for image in images)])
    group_of = np.arange(len(descriptors))
    for group in near_groups(descriptors, correlation):
        group_of[group] = group[0]
    originals, copies = np.split(group_of, 2)
    return int((originals == copies).sum())


def compared_pairs(census: Census, correlation: float) -> list[tuple[float, int, int]]:
    """Correlation and positions of all pairs that correlate by at least `correlation`, the least alike first."""
    compared = np.flatnonzero(census.readable() & ~census.blank)
    descriptors = census.records["descriptor"]
    pairs = []
    for left, right in near_pairs(descriptors[compared], descriptors[compared], correlation):
        for first, second in zip(compared[left[left < right]], compared[right[left < right]], strict=True):
            (value,) = correlations(descriptors[[first]], descriptors[second])
            pairs.append((float(value), int(first), int(second)))
    return sorted(pairs)


def count_pairs(census: Census, pairs: list[tuple[float, int, int]], least: float) -> list[int]:
    """Number of pairs that correlate by at least `least`: all, of two classes, of two splits."""
    close = np.array([pair[1:] for pair in pairs if pair[0] >= least], int).reshape(-1, 2).T
    differ = [(values[close[0]] != values[close[1]]).sum() for values in (census.label, census.split)]
    return [close.shape[1], *map(int, differ)]


def draw_pairs(census: Census, pairs: list[tuple[float, int, int]], path: Path) -> None:
    """Save a picture of the pairs, the least alike first, with their correlation and classes."""
    rows = -(-len(pairs) // PER_ROW)
    sheet = Image.new("L", (PER_ROW * (2 * SIDE + 20), rows * (SIDE + 20)))
    draw = ImageDraw.Draw(sheet)
    for number, (value, *positions) in enumerate(pairs):
        left, top = number % PER_ROW * (2 * SIDE + 20), number // PER_ROW * (SIDE + 20)
        for place, index in enumerate(positions):
            image = read_image(Path(census.path(index)), gray=True).resize((SIDE, SIDE))
            sheet.paste(image, (left + place * SIDE, top + 14))
        classes = dict.fromkeys(census.classes[census.label[index]] for index in positions)
        draw.text((left, top), f"{value:.3f} {', '.join(classes)}", fill=255)
    sheet.save(path)


def timed_search(count: int) -> str:
    """Time and memory of the search among generated descriptors, of which every hundredth is a copy of the one before.

    There are CENTRES kinds of images; two of one kind correlate by one half.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CENTRES, FREQUENCIES**2)).astype(np.float32)
    descriptors = np.empty((count, FREQUENCIES**2), np.int8)
    for start in range(0, count, CENTRES):
        vectors = centres + rng.normal(size=centres.shape).astype(np.float32)
        vectors[1::100] = vectors[::100] + rng.normal(scale=0.1, size=vectors[::100].shape)  # correlates by 0.998
        block = descriptors[start : start + CENTRES]
        block[:] = np.round(127 / np.abs(vectors).max(axis=1, keepdims=True) * vectors)[: len(block)]
    start = time.perf_counter()
    groups = near_groups(descriptors, CORRELATION)
    seconds = time.perf_counter() - start
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    copies = len(range(0, count - 1, 100))
    return f"{count} descriptors: {len(groups)} of {copies} pairs found in {seconds:.1f} s, {gigabytes:.1f} GB in all."


def print_table(head: str, rows: Iterable[list[object]]) -> None:
    print(f"| {head} |\n|{'---|' * len(head.split('|'))}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    run_script(main)
