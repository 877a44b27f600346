"""What is wrong with a page of Markdown: its fences, what stands inside them, and where its links lead."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r" {0,3}(?P<marks>`{3,}|~{3,})(?P<info>.*)")
TABLE = re.compile(r"\s*\|.*\|\s*|\s*\|?(\s*:?-{3,}:?\s*\|)+(\s*:?-{3,}:?)?\s*")
IMAGE = re.compile(r"!\[[^\]]*\]\(|<img\b")
LINK = re.compile(r"\]\(\s*(?P<target><[^>]*>|[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+\"[^\"]*\")?\s*\)")
OTHER_LINKS = re.compile(r"^\[[^\]]+\]:\s*(?P<definition>\S+)|\b(?:href|src)=\"(?P<html>[^\"]*)\"", re.MULTILINE)
HEADING = re.compile(r" {0,3}#{1,6}\s+(?P<text>.+?)(?:\s+#+)?\s*")
SCRIPT = re.compile(r"`(?P<path>[\w.]+/[\w./]*\.(?:py|sh))`")  # a file of the repository, named in the text


def blocks_and_text(page: str) -> tuple[list[tuple[str, str]], str, list[str]]:
    """The fenced blocks (language, content), the text around them, and what is wrong with the fences."""
    blocks: list[tuple[str, list[str]]] = []
    text, wrong, opened, since = [], [], "", 0
    for number, line in enumerate(page.splitlines(), start=1):
        fence = FENCE.fullmatch(line)
        if fence and not opened:
            opened, since = fence["marks"], number
            blocks.append((fence["info"].strip(), []))
        elif fence and fence["marks"].startswith(opened) and fence["info"].strip():
            wrong.append(f"line {number}: a fence opens within the one of line {since}")
            opened, since = fence["marks"], number
        elif fence and fence["marks"].startswith(opened):
            opened = ""
        else:
            (blocks[-1][1] if opened else text).append(line)
    if opened:
        wrong.append(f"line {since}: a fence is never closed")
    return [(language, "\n".join(lines)) for language, lines in blocks], "\n".join(text), wrong


def anchors(page: str) -> set[str]:
    """The names that GitHub gives the headings of a page, and those it sets itself."""
    _, text, _ = blocks_and_text(page)
    seen: Counter[str] = Counter()
    found = set(re.findall(r"\b(?:id|name)=\"([^\"]+)\"", text))
    for line in text.splitlines():
        if heading := HEADING.fullmatch(line):
            shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading["text"])
            name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            found.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return found


def faults(path: Path, root: Path) -> list[str]:
    """All that is wrong with the page at `path`, a sentence each; root: of the repository."""
    page = path.read_text()
    blocks, text, found = blocks_and_text(page)
    for line in "\n".join(content for _, content in blocks).splitlines():
        if TABLE.fullmatch(line):
            found.append(f"a table in a code block: {line.strip()}")
        if IMAGE.search(line):
            found.append(f"an image in a code block: {line.strip()}")
    for target in link_targets(text):
        if fault := fault_of_link(target, path, page, root):
            found.append(fault)
    for named in SCRIPT.finditer(text):
        if not (root / named["path"]).is_file() and not (path.parent / named["path"]).is_file():
            found.append(f"no such file: {named['path']}")
    return found


def link_targets(text: str) -> Iterator[str]:
    """The targets of all links and images of a text without code blocks."""
    text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "`code`", text, flags=re.DOTALL)
    for link in LINK.finditer(text):
        yield link["target"].strip("<>")
    for link in OTHER_LINKS.finditer(text):
        yield link["definition"] or link["html"] or ""


def fault_of_link(target: str, path: Path, page: str, root: Path) -> str | None:
    """What is wrong with one link of the page; None: it leads somewhere, or out of the repository."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return None
    file, _, anchor = target.partition("#")
    aimed = (path.parent / file).resolve() if file else path
    if not target or not aimed.exists() or not aimed.is_relative_to(root):
        return f"a link to nothing in the repository: ({target})"
    if not anchor:
        return None
    if aimed.is_dir():
        aimed = aimed / "README.md"
    there = anchors(page if aimed == path else aimed.read_text()) if aimed.suffix == ".md" and aimed.exists() else set()
    return None if anchor in there else f"a link to no heading: ({target})"


def command_lines(page: str, root: Path) -> Iterator[tuple[Path, list[str]]]:
    """The lines of a page's bash blocks as (folder, words): continued lines joined, `cd` followed from the root."""
    for language, content in blocks_and_text(page)[0]:
        folder = root
        for line in content.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["cd"]:
                folder = (folder / words[1]).resolve()
            yield folder, words
