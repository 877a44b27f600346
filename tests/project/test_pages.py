"""All pages: commands that are parsed, links that lead somewhere."""

import argparse
import importlib
import re
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.markdown import anchors, command_lines, faults

README = (ROOT / "README.md").read_text()
OWN = ("_normal", "_policy_gradient", "utils", "benchmarks", "experiments")  # packages whose commands are parsed
# What other programs write, and what is no page yet: a template.
NOT_PAGES = ("demo", "templates", "runs")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for top in ROOT.iterdir()
    if not top.name.startswith(".")
    for path in ([top] if top.is_file() else top.rglob("*"))
    if path.suffix == ".md" and not set(path.relative_to(ROOT).parts) & set(NOT_PAGES)
)


@pytest.mark.parametrize("name", PAGES)
def test_fences_are_closed_and_links_lead_somewhere(name):
    assert faults(ROOT / name, ROOT) == []


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("```bash\npython x.py -o ![Differences](d.png)\n```\n", "an image in a code block"),
        ('```\n<img src="d.png">\n```\n', "an image in a code block"),
        ("```bash\n| arm | seeds |\n```\n", "a table in a code block"),
        ("~~~\n|---|---:|\n~~~\n", "a table in a code block"),
        ("```bash\narm | seeds\n---|:---:\n```\n", "a table in a code block"),
        ("```bash\nls\n", "line 1: a fence is never closed"),
        ("text\n\n```bash\nls\n\n```python\n1\n```\n", "line 6: a fence opens within the one of line 3"),
        ("[there](gone.md)\n", "a link to nothing in the repository: (gone.md)"),
        ("![there](figures/gone.png)\n", "a link to nothing in the repository: (figures/gone.png)"),
        ("[there](/etc/passwd)\n", "a link to nothing in the repository: (/etc/passwd)"),
        ("[a\nlong one](gone)\n", "a link to nothing in the repository: (gone)"),
        ("[there]()\n", "a link to nothing in the repository: ()"),
        ("[there][1]\n\n[1]: gone.md\n", "a link to nothing in the repository: (gone.md)"),
        ('<img src="gone.png">\n', "a link to nothing in the repository: (gone.png)"),
        ("# Here\n\n[there](#gone)\n", "a link to no heading: (#gone)"),
        ("[there](other.md#gone)\n", "a link to no heading: (other.md#gone)"),
        ("```bash\n# Here\n```\n[there](#here)\n", "a link to no heading: (#here)"),
        ("see `utils/gone.py`\n", "no such file: utils/gone.py"),
    ],
)
def test_a_page_with_a_fault_is_refused(page, expected, tmp_path):
    (tmp_path / "other.md").write_text("# Other, with `code`: twice\n\n## Again\n\n## Again\n")
    (tmp_path / "page.md").write_text(page)
    (found,) = faults(tmp_path / "page.md", tmp_path)
    assert found.startswith(expected)


def test_a_page_without_faults_is_accepted(tmp_path):
    (tmp_path / "other.md").write_text("# Other, with `code`: twice\n\n## Again\n\n## Again\n")
    page = "# Here\n\n| a |\n|---|\n| `[x](gone)` |\n\n```bash\ncat a | sort | uniq\n```\n\n"
    links = "[a](other.md#again-1) [b](#here) [c](https://example.org/gone) [d](other.md#other-with-code-twice)\n"
    (tmp_path / "page.md").write_text(page + links)
    assert faults(tmp_path / "page.md", tmp_path) == []
    assert anchors((tmp_path / "other.md").read_text()) == {"other-with-code-twice", "again", "again-1"}


def commands_of(page):
    """The commands of a page that are this repository's: (module, arguments)."""
    for folder, words in command_lines(page, ROOT):
        own = [word for word in words if word not in ("...", "&")]
        for index, word in enumerate(own):
            if word == "-m":
                if own[index + 1].split(".")[0] in OWN:
                    yield own[index + 1], own[index + 2 :]
                break
            if word.endswith(".py"):
                file = (folder / word).relative_to(ROOT).with_suffix("")
                yield ".".join(file.parts), own[index + 1 :]
                break  # what follows are its arguments


class Parsed(Exception):
    """The command line was understood; the command itself is not run."""


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_pages_is_parsed_as_it_stands(name, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(parser, arguments=None, namespace=None):
        parse_args(parser, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for module_name, words in commands_of((ROOT / name).read_text()):
        module = importlib.import_module(module_name)
        if not hasattr(module, "main"):
            module = importlib.import_module(f"{module_name}.__main__")
        monkeypatch.setattr(sys, "argv", [module_name, *words])
        with pytest.raises(Parsed):
            module.main()


def test_the_pages_name_each_command():
    """So that the test above looks at them at all."""
    found = {module for name in PAGES for module, _ in commands_of((ROOT / name).read_text())}
    assert found >= {
        *("_normal.train", "_policy_gradient.train", "_policy_gradient.gallery", "utils.audit", "utils.plots"),
        *("utils.export", "utils.predict", "utils.weight_averaging", "utils.radimagenet", "utils.phantoms"),
        *("utils.prepare", "utils.medmnist", "utils.probe"),
        *("experiments.run", "experiments.analyse", "experiments.learning_signal", "experiments.build_mini_rin"),
        *("experiments.paper", "experiments.collect", "experiments.choose_rates", "experiments.false_claims"),
        *("experiments.shifts", "experiments.probe_tables"),
        *("benchmarks.run", "benchmarks.curves", "benchmarks.profiles", "benchmarks.soak"),
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_shell_script_and_make_target_of_the_pages_exists(name):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for folder, words in command_lines((ROOT / name).read_text(), ROOT):
        if words[:1] == ["make"]:
            assert words[1] in targets
        if words[:1] == ["bash"]:
            assert (folder / words[1]).is_file()


def test_the_citation_is_the_entry_that_the_authors_ask_for():
    """In the README and in the card of exported weights."""
    for page in (README, (ROOT / "utils" / "results" / "templates" / "model_card.md").read_text()):
        (entry,) = re.findall(r"```bibtex\n(.*?)```", page, re.DOTALL)
        assert entry.startswith("@inproceedings{yavuz2025policy,\n")
        assert dict(re.findall(r"  (\w+) = \{(.*)\}", entry)) == {
            "title": "Policy Gradient-Driven Noise Mask",
            "author": "Yavuz, Mehmet Can and Yang, Yang",
            "booktitle": "International Conference on Pattern Recognition",
            "pages": "414--431",
            "year": "2025",
            "organization": "Springer",
        }
