"""The agreements between dvc.yaml, params.yaml, the code and what is written about them."""

import ast
import importlib
import inspect
import re
import shlex
import string
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import AfterValidator, Field, TypeAdapter
from ruamel.yaml import YAML

from breedline.code import EXEMPT, code_of
from breedline.edge import PARAMS
from breedline.errors import BreedlineError, NetworkError
from breedline.params import Params, load_params
from flows import judge
from flows.policy import policy_of
from flows.serve import POOL

ROOT = Path(__file__).parents[1]
DVC = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES: dict[str, dict[str, Any]] = DVC["stages"]
PYTHON = sorted([*ROOT.glob("stages/*.py"), *ROOT.glob("breedline/*.py")])
TEMPLATES = (".html", ".css", ".js")
"""What pages are made of; they lie beside the code, and decide bytes as it does."""
EMPTY = inspect.Parameter.empty

each_stage = pytest.mark.parametrize("name", STAGES)


def _paths(entries: list[Any]) -> set[str]:
    """The paths of a list in dvc.yaml, whose entries may carry settings of their own."""
    return {path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)}


def _written(name: str) -> set[str]:
    return set().union(*(_paths(STAGES[name].get(kind, [])) for kind in ("outs", "metrics", "plots")))


def _function(name: str) -> Callable[..., None]:
    return getattr(importlib.import_module(f"stages.{name}"), name)


def _parameters(name: str) -> list[inspect.Parameter]:
    """Those of the stage's function, but for the first, its section of params.yaml."""
    return list(inspect.signature(_function(name)).parameters.values())[1:]


def _flags(name: str) -> dict[str, str]:
    """What the stage's command passes, by parameter."""
    words = shlex.split(STAGES[name]["cmd"])
    assert words[:3] == ["python", "-m", f"stages.{name}"]
    flags, values = words[3::2], words[4::2]
    assert len(flags) == len(values) == len(set(flags))
    assert all(flag.startswith("--") for flag in flags)
    return {flag.removeprefix("--"): value for flag, value in zip(flags, values, strict=True)}


def test_a_stage_a_module_a_section_and_a_field_share_a_name() -> None:
    names = set(STAGES)
    assert names == {path.stem for path in ROOT.glob("stages/*.py")} - {"__init__"}
    assert {*names, "gate", "score"} == set(YAML(typ="safe").load(ROOT / "params.yaml")) == set(Params.model_fields)


@each_stage
def test_a_stage_is_the_function_of_its_section(name: str) -> None:
    first = next(iter(inspect.signature(_function(name)).parameters.values()))
    assert first.name == "params"
    assert first.annotation is Params.model_fields[name].annotation
    assert STAGES[name]["params"] == [name]


@each_stage
def test_a_command_is_the_signature(name: str) -> None:
    known = {parameter.name for parameter in _parameters(name)}
    needed = {parameter.name for parameter in _parameters(name) if parameter.default is EMPTY}
    assert needed <= set(_flags(name)) <= known


@each_stage
def test_inputs_are_the_dependencies_and_outputs_the_outs(name: str) -> None:
    inputs = {p.name for p in _parameters(name) if p.annotation is Path and p.kind is p.POSITIONAL_OR_KEYWORD}
    outputs = {p.name for p in _parameters(name) if p.annotation is Path and p.kind is p.KEYWORD_ONLY}
    flags = _flags(name)
    data = {path for path in STAGES[name]["deps"] if not path.endswith((".py", *TEMPLATES))}
    assert {flags[p] for p in inputs} == data
    assert {flags[p] for p in outputs} == _written(name)


def _templated() -> set[str]:
    return {key for stage in STAGES.values() for key in re.findall(r"\$\{(.*?)\}", str(stage))}


@pytest.mark.parametrize("key", sorted(_templated()))
def test_what_dvc_puts_into_a_command_is_a_setting_that_no_shell_can_misread(key: str) -> None:
    """DVC quotes nothing of what it puts in place of `${…}`, and whoever asks for a run may choose the value."""
    section, name = key.split(".")
    field = Params.model_fields[section].annotation.model_fields[name]  # type: ignore[union-attr]
    value = TypeAdapter(Annotated[field.annotation, Field(), *field.metadata])
    value.validate_python(YAML(typ="safe").load(ROOT / "params.yaml")[section][name])
    # without what checks that a name is known, as a list of names is no guard
    shape = TypeAdapter(
        Annotated[field.annotation, Field(), *(m for m in field.metadata if not isinstance(m, AfterValidator))]
    )
    for character in string.printable:
        if not re.fullmatch(r"[\w.-]", character, re.ASCII):
            for text in (f"x{character}y", f"{character}x", f"x{character}"):
                with pytest.raises(ValueError, match="should"):
                    shape.validate_python(text)


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("breedline", "stages", cache_dir=None)


@each_stage
def test_a_stage_depends_on_the_code_that_it_imports_but_for_what_is_exempt(name: str) -> None:
    graph = grimp.build_graph("breedline", "stages", cache_dir=None)
    for module in EXEMPT:
        graph.remove_module(module)
    modules = {f"stages.{name}", *graph.find_upstream_modules(f"stages.{name}")}
    files = {f"{module.replace('.', '/')}.py" for module in modules}
    assert {path for path in STAGES[name]["deps"] if path.endswith(".py")} == files
    assert {path.relative_to(ROOT).as_posix() for path in code_of(ROOT / f"stages/{name}.py")} == files


@each_stage
def test_a_stage_depends_on_what_its_pages_are_made_of(name: str) -> None:
    beside = {path.name: path for path in ROOT.glob("breedline/*.*") if path.suffix in TEMPLATES}
    found: set[Path] = set()
    waiting = [ROOT / path for path in STAGES[name]["deps"] if path.endswith(".py")]
    while waiting:
        text = waiting.pop().read_text("utf-8")
        named = {beside[file] for file in re.findall(r'"([a-z_]+\.[a-z]+)"', text) if file in beside} - found
        found |= named
        waiting += named
    listed = {path for path in STAGES[name]["deps"] if path.endswith(TEMPLATES)}
    assert listed == {path.relative_to(ROOT).as_posix() for path in found}


def test_what_is_exempt_is_imported_and_says_why(imports: grimp.ImportGraph) -> None:
    used = set().union(*(imports.find_upstream_modules(f"stages.{name}") for name in STAGES))
    assert set(EXEMPT) <= used
    assert all(len(why.split()) > 3 for why in EXEMPT.values())


def test_no_value_of_a_setting_stands_in_the_code_that_no_stage_depends_on() -> None:
    """A default that decides bytes would change them without a stage being run again."""
    schema = Params.model_json_schema()
    models = (schema, *schema["$defs"].values())
    assert {field.get("default") for model in models for field in model.get("properties", {}).values()} == {None}


def test_importing_a_package_imports_no_module_of_it(imports: grimp.ImportGraph) -> None:
    assert not imports.find_modules_directly_imported_by("stages")
    on_demand = {"breedline.classifier"}
    assert imports.find_modules_directly_imported_by("breedline") == on_demand


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a Python file that could be paths, with their lines: docstrings and messages have spaces."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_path_of_the_pipeline_is_written_in_python(path: Path) -> None:
    paths = set().union(*map(_written, STAGES), *(_paths(stage["deps"]) for stage in STAGES.values()))
    data = {path for path in paths if not path.endswith((".py", *TEMPLATES))} - {str(PARAMS)}
    folders = tuple({f"{path.split('/')[0]}/" for path in data})
    assert [(line, text) for line, text in _strings(path) if text in data or text.startswith(folders)] == []


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *sorted(ROOT.glob("presets/*.yaml"))], ids=lambda p: p.name)
def test_settings_that_come_with_the_project_are_right(path: Path) -> None:
    load_params(path)


def test_no_setting_has_a_name_that_dvc_ignores() -> None:
    """DVC leaves keys of these names out of what it knows a run by (its issue 10296), so a change would go unseen."""
    schema = Params.model_json_schema()
    names = {name for model in (schema, *schema["$defs"].values()) for name in model.get("properties", {})}
    assert names & {"size", "nfiles"} == set()


def _plotted() -> Iterator[str]:
    for entry in DVC["plots"]:
        for name, settings in {entry: {}}.items() if isinstance(entry, str) else entry.items():
            y = (settings or {}).get("y")
            yield from y if isinstance(y, dict) else [name] if "/" in name else []


@pytest.mark.parametrize("path", list(_plotted()))
def test_what_is_plotted_is_an_output(path: str) -> None:
    assert {str(parent) for parent in (Path(path), *Path(path).parents)} & set().union(*map(_written, STAGES))


def test_what_is_published_is_an_output() -> None:
    assert {artifact["path"] for artifact in DVC["artifacts"].values()} <= set().union(*map(_written, STAGES))


def test_what_the_gate_reads_is_an_output() -> None:
    assert {judge.LABELS, judge.PRESIZED} <= set().union(*map(_written, STAGES))


@each_stage
def test_what_a_stage_says_to_prefect_is_understood(name: str) -> None:
    policy = policy_of(name, STAGES[name]["meta"])
    outs = _written(name)
    assert all({path, *map(str, Path(path).parents)} & outs for path in policy.show)


def test_a_mistake_in_a_label_is_never_tried_again_and_the_network_is() -> None:
    policies = {name: policy_of(name, stage["meta"]) for name, stage in STAGES.items()}
    assert [name for name in STAGES if BreedlineError.exit_code in policies[name].retry_on] == []
    assert [name for name in STAGES if NetworkError.exit_code in policies[name].retry_on] == ["download", "weights"]
    assert policies["label"].retries == 0
    assert policies["train"].retry_on == [137, 143]


DEPLOYMENTS: list[dict[str, Any]] = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_a_deployment_is_a_flow_with_these_parameters(deployment: dict[str, Any]) -> None:
    path, name = deployment["entrypoint"].split(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
    assert deployment["work_pool"]["name"] == POOL
    started = deployment["parameters"].get("deployment", "retrain/on-demand").split("/")[1]
    assert started in {deployment["name"] for deployment in DEPLOYMENTS}


def test_what_is_installed_is_every_package() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    assert set(tool["setuptools"]["packages"]) == set(tool["importlinter"]["root_packages"]) == packages
    others = {path for package in packages for path in ROOT.glob(f"{package}/*.*") if path.suffix != ".py"}
    listed = tool["setuptools"]["package-data"]
    assert others == {ROOT / package / name for package, names in listed.items() for name in names}


def _direct_requirements() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            yield from (Requirement(of_extra) for extra in sorted(requirement.extras) for of_extra in extras[extra])
        else:
            yield requirement


def _pins(lock: str = "requirements.txt") -> list[str]:
    lines = (ROOT / lock).read_text("utf-8").replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("requirement", list(_direct_requirements()), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned(requirement: Requirement) -> None:
    pinned = {canonicalize_name(name): rest for name, _, rest in (pin.partition("==") for pin in _pins())}
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)].split()[0])


each_lock = pytest.mark.parametrize("lock", ["requirements.txt", "requirements-predict.txt"])


@each_lock
def test_every_pin_has_a_version_and_hashes(lock: str) -> None:
    shape = re.compile(r"[\w.-]+==[\w.+!]+(?: ; [^\\]+?)?(?: +--hash=sha256:[0-9a-f]{64})+ *")
    assert [pin for pin in _pins(lock) if not shape.fullmatch(pin)] == []


@each_lock
def test_the_pins_name_no_place(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8")
    assert "://" not in text
    assert " @ " not in text
