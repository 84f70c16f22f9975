"""The house: the root is the method, and nothing in it needs another paper, a benchmark or
a task to be imported."""
import ast

from tests.processes import ROOT, run

OTHERS = ("search", "flextron", "tasks", "bench")
ROOT_FILES = sorted(path.stem for path in ROOT.glob("*.py"))


def modules() -> dict[str, set[str]]:
    """module -> the modules of this project that it imports at its top."""
    paths = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0].startswith(".") or parts[0] in ("tests", "out"):
            continue
        paths[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in paths}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(paths)
                graph[name] |= inside or ({node.module} & set(paths))
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All modules that importing `start` loads."""
    found, waiting = set(), [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def test_the_root_holds_the_method_and_no_more():
    """Catches a program that settles at the root."""
    assert ROOT_FILES == ["eval", "export", "importance", "model", "router", "sample", "space", "train"]


def test_no_circles():
    """Catches two modules that import each other, directly or by way of others."""
    graph = modules()
    assert len(graph) > 40
    for name in graph:
        assert name not in reached(graph, name), (
            f"{name} imports itself by way of {sorted(reached(graph, name))}")


def test_no_arrow_to_another_paper():
    """Catches a chapter of the method that loads another paper, a benchmark or a task; in a process
    of its own, so that imports inside functions that run at import time count too."""
    code = f"""
import importlib, sys
for name in {ROOT_FILES}:
    importlib.import_module(name)
    others = [module for module in sys.modules if module.split('.')[0] in {OTHERS}]
    assert not others, (name, others)
print('none')
"""
    done = run("-c", code)
    assert done.returncode == 0 and done.stdout.strip() == "none", done.stdout + done.stderr[-2000:]
