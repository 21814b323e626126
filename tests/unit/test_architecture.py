"""The shape of the package, read from its imports: one direction, one home a heavy dependency, no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_gspo

ROOT = Path(megatron_gspo.__file__).parent

LAYERS = [
    {"errors", "limits", "section", "_packing", "quiet", "versions", "platforms", "hooks"},
    {"supervise", "named", "untrusted"},
    {"types", "storage", "calls"},
    {"batching"},
    {"algorithm", "kernels"},
    {"config"},
    {"parallel", "sandbox"},
    {"rollout", "rewards", "sync", "megatron", "hf", "data"},
    {"suites"},
    {"train", "report", "convert"},
    {"runs"},
    {"evaluation"},
    {"bench", "compare", "doctor", "parity"},
    {"dryrun"},
    {"plan"},
    {"commands"},
    {"cli", "__init__", "__main__"},
]
"""From the bottom: a module imports from lower layers and from its own package."""

EXCEPTIONS = {
    ("megatron", "hf"): "models read and write weights through hf's tables of names",
    ("sync", "rollout"): "a sync reaches servers through the engine's control",
    ("sync", "hf"): "a sync sends what a Hugging Face directory holds, in the same buckets",
}
"""Edges between siblings, each with its reason."""

LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
MODULES = sorted(ROOT.rglob("*.py"))
NAMED = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
NAMES = set(NAMED)


def name_of(path: Path) -> str:
    """What a file belongs to: ``megatron`` for ``megatron/model.py``, ``types`` for ``types.py``."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of_ours(path: Path) -> set[str]:
    dotted = (name.split(".") for name in imports(path))
    return {parts[1] for parts in dotted if parts[0] == "megatron_gspo" and len(parts) > 1 and parts[1] in LEVEL}


def importers(library: str) -> set[str]:
    return {
        str(path.relative_to(ROOT)) for path in MODULES if any(name.split(".")[0] == library for name in imports(path))
    }


def test_every_module_has_a_layer():
    assert {name_of(path) for path in MODULES} <= set(LEVEL)


def test_imports_run_one_way():
    upward = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in MODULES
        for package in [name_of(path)]
        for imported in imports_of_ours(path) - {package}
        if LEVEL[imported] >= LEVEL[package] and (package, imported) not in EXCEPTIONS
    ]
    assert not upward


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports when it is used, inside functions too; not those that only types need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        ast.unparse(statement)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and ast.unparse(node) not in guarded:
            found |= {
                name if name in NAMES else str(node.module) for name in (f"{node.module}.{a.name}" for a in node.names)
            }
    return found & NAMES


def test_no_files_import_each_other_in_a_circle():
    waiting = {name: imported_modules(path) - {name} for name, path in zip(NAMED, MODULES, strict=True)}
    while free := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, "each of these imports one that imports it in the end"


def test_every_exception_is_in_use():
    edges = {(name_of(path), imported) for path in MODULES for imported in imports_of_ours(path)}
    assert set(EXCEPTIONS) <= edges


def test_only_one_package_imports_megatron():
    assert {path.split("/")[0] for path in importers("megatron")} <= {"megatron"}


def test_only_the_server_launcher_imports_sglang():
    assert importers("sglang") <= {"rollout/sglang/server.py"}


def test_only_files_that_are_imported_when_a_kernel_is_called_import_triton():
    files = importers("triton")
    assert files and all(name.startswith("kernels/triton_") for name in files)
    kernels = {f"megatron_gspo.{name.removesuffix('.py').replace('/', '.')}" for name in files}
    run(f"""
import sys
for name in {sorted(NAMES - kernels)}:
    if name.startswith("megatron_gspo.kernels") or name == "megatron_gspo.parallel.logprobs":
        __import__(name)
assert "triton" not in sys.modules
""")


def test_the_pure_functions_use_no_collectives():
    pure = [path for path in MODULES if name_of(path) in {"algorithm", "batching", "types", "errors"}]
    assert not [path for path in pure if any(name.startswith("torch.distributed") for name in imports(path))]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["config", "errors", "algorithm.catalog", "algorithm.gspo"])
def test_the_configuration_is_read_without_torch(module):
    run(f"import megatron_gspo.{module}, sys; assert 'torch' not in sys.modules")


def test_importing_any_module_leaves_the_process_as_it_was():
    """Environment, default dtype and thread count. Third-party packages that set variables are imported beforehand."""
    modules = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in MODULES]
    ours = [module for module in modules if not module.endswith("__main__")]
    third_party = sorted(
        {
            name.split(".")[0]
            for path in MODULES
            for name in imports(path)
            if name.split(".")[0] not in {"megatron_gspo", "megatron", "sglang", *sys.stdlib_module_names}
        }
    )
    run(f"""
import importlib, os
for name in {third_party} + ["megatron.core"]:
    try:
        importlib.import_module(name)
    except ImportError:  # an extra that is not installed
        pass
import torch
state = lambda: (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), os.getcwd())
for name in {ours}:
    before = state()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # kernels are imported where Triton is installed
        assert error.name == "triton", name
    assert state() == before, name
""")


def test_one_module_asks_whether_there_is_cuda():
    """What differs by device is a table there; SGLang's stand-in asks in the servers' environment, which has none of
    this package's."""
    asking = {
        str(path.relative_to(ROOT)) for path in MODULES if "cuda.is_available" in path.read_text(encoding="utf-8")
    }
    assert asking == {"platforms.py", "rollout/sglang/server.py"}
