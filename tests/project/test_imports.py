"""The rules of the layout, read from the syntax trees: who imports whom, and where the argparse namespace goes."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COMMANDS = (
    *(
        "audit",
        "prepare",
        "medmnist",
        "radimagenet",
        "phantoms.__main__",
        "plots",
        "report",
        "weight_averaging",
        "export",
    ),
    *("predict", "probe"),
)
LAYERS = (  # a package imports only itself and layers before its own
    ("utils.runtime",),
    ("utils.phantoms", "utils.choices"),
    ("utils.data", "utils.checkpoints", "utils.arguments"),
    ("utils.results",),
    ("utils.training",),
    ("utils.flags",),
    ("utils.inference",),
    (*(f"utils.{name}" for name in COMMANDS), "_policy_gradient", "_normal"),
    ("experiments",),
    ("benchmarks", "figures"),
)
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
TAKE_NAMESPACE = ("training.build", "training.run", "data.splits", "arguments", "flags", "runtime.command_line")
FOLDERS = ("utils", "_policy_gradient", "_normal", "benchmarks", "experiments", "figures")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}
MODULES = [name for name in TREES if not name.endswith("__init__")]


def package_of(module):
    return max((package for package in LAYER_OF if f"{module}.".startswith(f"{package}.")), key=len, default=None)


def imported(module):
    """The modules that a module imports; names of functions and classes may follow after a dot."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_before_its_own(module):
    own = package_of(module)
    packages = {package_of(name) for name in imported(module)} - {None, own}
    assert [package for package in packages if LAYER_OF[package] >= LAYER_OF[own]] == []


@pytest.mark.parametrize("module", [name for name in MODULES if LAYER_OF[package_of(name)] < 7])
def test_the_namespace_and_the_launchers_variables_stay_in_their_modules(module):
    nodes = list(ast.walk(TREES[module]))
    annotations = [ast.unparse(node.annotation) for node in nodes if isinstance(node, ast.arg) and node.annotation]
    takes_namespace = any("argparse.Namespace" in annotation for annotation in annotations)
    assert not takes_namespace or module.removeprefix("utils.") in TAKE_NAMESPACE
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    launch = [word for word in words if word in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or word.startswith("SLURM_")]
    assert not launch or module == "utils.runtime.launch"


@pytest.mark.parametrize("script", ["_normal.train", "_policy_gradient.train"])
def test_main_and_the_training_loop_fit_on_a_screen(script):
    functions = {node.name: node for node in TREES[script].body if isinstance(node, ast.FunctionDef)}
    main, loop = functions["main"], functions["train_one_epoch"]
    assert main.end_lineno - main.lineno < 45
    assert loop.end_lineno - loop.lineno < 50
    assert len(loop.args.args + loop.args.kwonlyargs) <= 7


@pytest.mark.parametrize("module", [name for name in TREES if name.endswith("__init__")])
def test_an_init_file_holds_a_docstring_only(module):
    assert ast.get_docstring(TREES[module])
    assert len(TREES[module].body) == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ["_normal.train", "_policy_gradient.train"])
def test_a_start_of_training_imports_nothing_for_plots(script):
    code = f"import sys, {script}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert not {"matplotlib", "sklearn", "tensorboard", "trackio"} & set(loaded)  # timm imports wandb if there is one
