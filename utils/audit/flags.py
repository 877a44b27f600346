"""The command line of the audit. Imports no torch."""

import os

from utils.flags import fraction, natural, non_negative_float
from utils.runtime.command_line import Parser, expanded, expanded_path

CORRELATION = 0.98  # measured by benchmarks/near_duplicates.py; see benchmarks/NEAR_COPIES.md
BLANK_BELOW = 2.0  # standard deviation in levels


def audit_parser(description: str) -> Parser:
    parser = Parser(description, prog="python -m utils.audit", show_defaults=True)
    add = parser.add_argument
    add("data", type=expanded, metavar="DATA", help="folder with {train,val,test}/<class>/<image>, or with "
        "<class>/<image>")  # fmt: skip
    add("-o", "--output", type=expanded, default="audit", metavar="FOLDER", help="folder for the reports and tables")
    add("--overwrite", action="store_true", help="replace existing reports and lists")
    add("--exclude-list", type=expanded, metavar="FILE", help="also write a list of images to leave out, for --exclude "
        "of the training")  # fmt: skip
    add("--correlation", type=fraction, default=CORRELATION, help="near copies are images whose gradients "
        "at low resolution correlate by at least this; a smaller number finds more copies and more false ones. A group "
        "of the report is a chain of such pairs; the list counts direct copies only, and near ones only across "
        "splits")  # fmt: skip
    add("--exact", action="store_true", help="only images with identical pixels are duplicates")
    add("--blank", type=non_negative_float, default=BLANK_BELOW, metavar="LEVELS", help="an image is blank if the "
        "standard deviation of its levels, 0 to 255, is below this in every channel")  # fmt: skip
    add("--groups", type=expanded_path, metavar="TABLE", help="CSV or TSV file with a column of images, as "
        "<split>/<class>/<image>, and one of groups such as patients: reports groups in several splits. images.csv of "
        "utils.prepare is such a table")  # fmt: skip
    add("--group-column", default="group", metavar="COLUMN", help="column of --groups with the groups")
    add("--upper-8-bits", action="store_true", help="keep the upper 8 bits of PNG and TIFF images of 12 or 16 bits per "
        "channel, like the flag of the training; without it they are unreadable")  # fmt: skip
    add("-j", "--workers", type=natural, default=os.cpu_count(), help="processes that decode; 0: the main process")
    return parser
