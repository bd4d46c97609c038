"""The code that decides what a stage writes: what dvc.yaml names as its dependencies, and what a bundle was made by.

A change in one of these files reruns the stage. The modules in EXEMPT decide how a stage is started, checked and watched,
never what it writes, so that rewording a message of theirs costs nobody a training.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from breedline.files import sha256_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("breedline", "stages")
EXEMPT = {
    "breedline.cluster": "says where work is done, which decides no byte",
    "breedline.code": "names the files that count",
    "breedline.edge": "starts a stage as a process and tells its errors",
    "breedline.errors": "says how errors are told",
    "breedline.files": "puts files in place whole; their content is decided by who calls it",
    "breedline.params": "checks the settings; their values reach DVC by `params:`, and no default stands there",
    "breedline.parents": "ends a stage with the process that started it",
    "breedline.progress": "tells people how far a stage is",
    "breedline.ranks": "says which of several processes this is, which decides no number",
}
"""Modules that no stage depends on, each with the reason why a change of it changes no output."""


def code_of(file: Path) -> list[Path]:
    """The Python `file` itself and every module of the project that it imports, at any remove; sorted, without EXEMPT."""
    found = {file}
    waiting = [file]
    while waiting:
        for name in _imported_by(waiting.pop()):
            module = ROOT / f"{name.replace('.', '/')}.py"
            if module.is_file() and module not in found:
                found.add(module)
                waiting.append(module)
    return sorted(found)


def _imported_by(file: Path) -> Iterator[str]:
    """The project's modules that the text of `file` imports, wherever in it, but for EXEMPT."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:  # `from package import module`, or a name of a module
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.partition(".")[0] in PACKAGES and name not in EXEMPT)


def sha256_of_code(file: Path) -> str:
    """One hash of what `code_of` finds, by name and content, as 64 hex digits."""
    total = hashlib.sha256()
    for module in code_of(file):
        total.update(f"{module.relative_to(ROOT).as_posix()} {sha256_of(module)}\n".encode())
    return total.hexdigest()
