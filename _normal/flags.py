"""The flags of the conventional training, in addition to the shared ones. Imports no torch."""

from utils.flags import shared_parser
from utils.runtime.command_line import Parser, expanded

SCRIPT = "_normal"


def build_parser() -> Parser:
    parser = shared_parser(
        "Conventional training of a timm classifier: from scratch, from a heated model (--finetune), or only "
        "--test-only."
    )
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--finetune", type=expanded, metavar="FILE", help="start from these weights; other classes get "
        "a new head")  # fmt: skip
    group.add_argument("--freeze-backbone", action="store_true", help="train the head only")
    return parser
