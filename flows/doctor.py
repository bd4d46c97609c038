"""`breedline doctor`: tells what is wrong with the working folder and what it relies on, and repairs what is safe to repair."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from breedline.errors import BreedlineError
from flows.checks import CHECKS, NEED_PIPELINE, Finding


def main(repair: bool) -> int:
    """Print what is found in the working folder, after what was repaired of it; the exit code is 1 if a problem is left."""
    console, root = Console(highlight=False, soft_wrap=True), Path()
    found, tried = examine(root), set[str]()
    while repair and (todo := [one for one in _all(found) if one.repair and one.what not in tried]):
        for one in todo:
            tried.add(one.what)
            console.print(Text(_shown(f"repair   {_repaired(one)}"), "cyan"))
        found = examine(root)
    for name, findings in found.items():
        for one in findings:
            level, style = ("problem", "red") if one.problem else ("warning", "yellow")
            console.print(Text(_shown(f"{level:8} {name}: {one.what}"), style))
            by_itself = " (--repair does it)" if one.repair and not repair else ""
            if one.remedy:
                console.print(Text(_shown(f"         {one.remedy}{by_itself}")))
        if not findings:
            console.print(Text(f"ok       {name}", "green"))
    return int(any(one.problem for one in _all(found)))


def examine(root: Path) -> dict[str, list[Finding]]:
    """What each check finds, by its name; where DVC cannot read the pipeline, those that need it are left out."""
    found: dict[str, list[Finding]] = {}
    for check in CHECKS:
        if check not in NEED_PIPELINE or not any(one.problem for one in found["pipeline"]):
            found[check.__name__] = list(_guarded(check, root))
    return found


def _guarded(check: Callable[[Path], Iterator[Finding]], root: Path) -> Iterator[Finding]:
    try:
        yield from check(root)
    except (BreedlineError, OSError) as error:  # the message names the remedy, or the file
        yield Finding(str(error))


def _repaired(finding: Finding) -> str:
    try:
        return finding.repair() if finding.repair else ""
    except (BreedlineError, OSError) as error:
        return f"failed: {error}"


def _all(found: dict[str, list[Finding]]) -> list[Finding]:
    return [one for findings in found.values() for one in findings]


def _shown(text: str) -> str:
    """On one line, without what would command a terminal: the names of files and tags may hold anything."""
    return "".join(character if character.isprintable() else " " for character in text)[:1000]
