"""`python -m utils.phantoms OUTPUT`: generate a small synthetic data set in the ImageFolder layout."""

from collections.abc import Sequence

from utils.phantoms.dataset import generate, image_counts
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.text import print_line


def main(argv: Sequence[str] | None = None) -> None:
    """Generate a set and print its counts. Raises UserError for bad input."""
    parser = Parser(
        "Generate a small ImageFolder data set of synthetic CT, MR and ultrasound images.",
        prog="python -m utils.phantoms",
    )
    parser.add_argument("output", type=expanded_path, help="new folder for the set")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all image counts (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        root = generate(options.output, options.seed, options.size, options.scale)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    for split, classes in image_counts(options.scale).items():
        listing = ", ".join(f"{name} {count}" for name, count in classes.items())
        print_line(f"{root / split}: {sum(classes.values())} images ({listing})")


if __name__ == "__main__":
    run_script(main)
