"""The arrows of the house: data walks one way, and a module imports only from rooms above it."""

import ast
from pathlib import Path

import pytest

import kvfold

ROOT = Path(kvfold.__file__).parent
#: from top to bottom
ROOMS = (
    "layout",
    "packing",
    "transforms",
    "quantizers",
    "codec",
    "codecs",
    "encoding",
    "sealed",
    "calibration",
    "cache",
    "attention",
    "kernels",
    "integrations",
    "evaluation",
    "planner",
    "cli",
)
#: downward imports inside a function: the catalogue fills itself, kernels are optional
LAZY = {("codec", "codecs"), ("attention", "kernels")}
#: downward imports under TYPE_CHECKING: codecs are handed an artefact
FOR_TYPES = {(room, "calibration") for room in ("codec", "codecs", "encoding")}
ONLY_INTEGRATIONS = {"transformers", "vllm"}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in ROOMS)


def imports(source: str) -> list[tuple[str, str, int]]:
    """(dotted name, "top" | "lazy" | "types", line) of every import."""
    found = []

    def visit(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = where
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = "lazy"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = "types"
            elif isinstance(child, ast.Import):
                found.extend((alias.name, where, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"line {child.lineno}: write the whole name of the module"
                # `from kvfold import codecs` means kvfold.codecs
                found.extend(
                    (f"{child.module}.{alias.name}", where, child.lineno) for alias in child.names
                )
            visit(child, inner)

    visit(ast.parse(source), "top")
    return found


def violations(room: str, source: str) -> list[str]:
    wrong = []
    for name, where, line in imports(source):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package in ONLY_INTEGRATIONS and room != "integrations":
            wrong.append(f"line {line}: only integrations/ imports {package}")
        if package != "kvfold" or target not in ROOMS:
            continue
        allowed = {"lazy": LAZY, "types": FOR_TYPES}.get(where, set())
        if ROOMS.index(target) > ROOMS.index(room) and (room, target) not in allowed:
            wrong.append(f"line {line}: {room} imports {name}, a room below it")
    return wrong


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_rooms_above(path: Path) -> None:
    wrong = violations(room_of(path), path.read_text())
    assert not wrong, f"{path.relative_to(ROOT)}: {'; '.join(wrong)}"


def test_every_room_is_known() -> None:
    found = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    unknown = found - set(ROOMS) - {"__init__", "__main__"}
    assert not unknown, f"rooms without a place in the house: {sorted(unknown)}"


def test_one_file_a_method_that_registers_it() -> None:
    for path in sorted((ROOT / "codecs").glob("[!_]*.py")):
        calls = [n.func.id for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]  # fmt: skip
        assert "register" in calls, f"codecs/{path.name} registers no preset"


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("packing", "from kvfold.codec import Codec"),
        ("quantizers", "import kvfold.codecs.kivi"),
        ("codec", "from kvfold import codecs"),
        ("codecs", "def f():\n    from kvfold.cache import store"),
        ("cache", "if TYPE_CHECKING:\n    from kvfold.attention import oracle"),
        ("cache", "import transformers"),
        ("evaluation", "def f():\n    from transformers.models import llama"),
    ],
)
def test_the_check_sees_wrong_arrows(room: str, source: str) -> None:
    assert violations(room, source), f"{room} may do {source!r}"
