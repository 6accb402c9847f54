"""The repository itself: packaging, import effects, declared dependencies, and nothing of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from index.quiet import SILENCE
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {"proxy", "index", "migrations", "tests", "deploy"}
HEAVY = ("faiss", "torch", "sentence_transformers", "onnxruntime", "numba", "transformers", "sqlalchemy")


def own_files(folder: Path) -> list[Path]:
    """The Python files of ours in a folder: npm's packages bring some of their own."""
    return [path for path in sorted(folder.rglob("*.py")) if "node_modules" not in path.parts]


def modules(package: str) -> list[str]:
    """Dotted names of every module of a package in the tree."""
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def imported(path: Path) -> set[str]:
    """Absolute names a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def arrows(*packages: str) -> dict[str, set[str]]:
    """Every module of these packages, and those of them that it imports anywhere: at its top, inside a function, for
    its types alone."""
    files = {
        name: ROOT.joinpath(*name.split(".")).with_suffix(".py") for package in packages for name in modules(package)
    }
    files = {name: path for name, path in files.items() if path.exists()}  # a package's own file is empty
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        named = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        found[name] = (named | imported(path)) & files.keys() - {name}
    return found


def check_no_circle(arrows: Mapping[str, set[str]]) -> None:
    """Raises CycleError, which names the modules that stand in one."""
    TopologicalSorter(arrows).prepare()


def declared(*extras: str) -> set[str]:
    """Distributions named by pyproject.toml, normalised."""
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        wanted += PROJECT["project"]["optional-dependencies"][extra]
    return {normalised(re.split(r"[<>=!~;\[ ]", requirement)[0]) for requirement in wanted}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


MAPPED = r"^(?:deploy[./])?(migrations|docs)\b"
"""What is installed below `proxy`, as a dotted name or a path."""


def test_the_packages_of_the_project_file_are_those_of_the_tree() -> None:
    setup = PROJECT["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("proxy", "index", "migrations", "deploy")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(setup["packages"]) == {re.sub(MAPPED, lambda name: f"proxy._{name[1]}", name) for name in found}
    assert setup["package-dir"] == {"proxy._docs": "deploy/docs", "proxy._migrations": "migrations"}


def test_package_init_files_are_empty() -> None:
    for top in ("proxy", "index", "migrations", "deploy"):
        for path in (ROOT / top).rglob("__init__.py"):
            assert path.read_bytes() == b"", path


LENT = {"jsontext": {"jiter"}}  # bytes in, values out; what it is not sure of the standard library's reader decides


@pytest.mark.parametrize("path", sorted((ROOT / "proxy" / "core").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_imports_the_standard_library_and_itself(path: Path) -> None:
    foreign = {name for name in imported(path) if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("proxy.core")} == LENT.get(path.stem, set())


@pytest.mark.parametrize("path", sorted((ROOT / "proxy" / "core").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_neither_awaits_nor_reads_a_clock(path: Path) -> None:
    waits = (ast.Await, ast.AsyncFor, ast.AsyncWith, ast.AsyncFunctionDef)
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, waits)]
    assert not imported(path) & {"time", "asyncio", "threading", "socket", "os", "random", "secrets"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    check_no_circle(arrows("proxy", "index"))


def test_a_circle_behind_a_lazy_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_repository.ROOT", tmp_path)
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "below.py").write_text("def f():\n    from house import above\n")
    (tmp_path / "house" / "above.py").write_text("import house.below\n")
    with pytest.raises(CycleError, match="cycle"):
        check_no_circle(arrows("house"))
    (tmp_path / "house" / "below.py").write_text("")
    check_no_circle(arrows("house"))


def floors() -> dict[str, int]:
    """Rooms of `proxy` by the floor that the import contract puts them on; the ground is 0."""
    (contract,) = (one for one in PROJECT["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    layers = [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
    return {f"proxy.{room}": height for height, layer in enumerate(reversed(layers)) for room in layer}


def upward(arrows: Mapping[str, set[str]], floors: Mapping[str, int]) -> Iterator[str]:
    """Imports of a room by another one that stands no higher."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    for module, found in arrows.items():
        for other in found:
            if room(module) != room(other) and floors[room(module)] <= floors[room(other)]:
                yield f"{module} -> {other}"


def test_no_module_imports_upward_even_lazily_or_for_its_types() -> None:
    assert sorted(upward(arrows("proxy"), floors())) == []


UPWARD = {
    "at its top": "import house.above\n",
    "inside a function": "def f():\n    from house import above\n",
    "inside a method that waits": "class C:\n    async def f(self):\n        from house.above import x\n",
}


@pytest.mark.parametrize("text", UPWARD.values(), ids=UPWARD)
def test_an_import_that_points_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """By the search above, and by the `layers` contract that `make lint` checks."""
    monkeypatch.setattr("tests.test_repository.ROOT", tmp_path)
    house = tmp_path / "house"
    house.mkdir()
    (house / "__init__.py").touch()
    (house / "above.py").write_text("x = 1\n")
    (house / "below.py").write_text(text)
    heights = {"house.above": 1, "house.below": 0}
    assert list(upward(arrows("house"), heights)) == ["house.below -> house.above"]
    config = tmp_path / "contracts.toml"
    config.write_text(
        '[tool.importlinter]\nroot_package = "house"\n[[tool.importlinter.contracts]]\nname = "floors"\n'
        'type = "layers"\nlayers = ["house.above", "house.below"]\n'
    )
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    command = [sys.executable, "-c", code, str(config)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, "house.below is not allowed to import house.above" in done.stdout) == (1, True), done
    (house / "below.py").write_text("")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=PATIENCE_S).returncode == 0


LONGEST = 60  # lines of a function


def longer(tree: ast.Module) -> Iterator[str]:
    """Functions of more than LONGEST lines, but kernels: what Numba compiles cannot be cut up without a price."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = {ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in node.decorator_list}
        assert node.end_lineno is not None
        if node.end_lineno - node.lineno >= LONGEST and not decorators & {"_kernel", "numba.njit", "njit"}:
            yield node.name


def test_no_function_is_longer_than_a_page() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("proxy", "index")
        for path in own_files(ROOT / folder)
        for name in longer(ast.parse(path.read_text()))
    }
    assert found == set()


def test_the_search_for_long_functions_finds_them() -> None:
    body = "    pass\n" * (LONGEST - 1)
    assert list(longer(ast.parse(f"def f():\n{body}"))) == []
    assert list(longer(ast.parse(f"class C:\n  async def f():\n{body}    pass\n"))) == ["f"]
    assert list(longer(ast.parse(f"def f():\n  @other(1)\n  def g():\n{body}    pass\n"))) == ["f", "g"]
    assert list(longer(ast.parse(f"@_kernel\ndef f():\n{body}    pass\n"))) == []


def test_environment_is_read_in_one_place() -> None:
    """The command line hands `os.environ` to `config.load`; nobody else looks."""
    readers = set()
    for name in ("proxy", "index"):
        for path in (ROOT / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    readers.add(str(path.relative_to(ROOT)))
    # the environment of a child process
    children = {"index/quiet.py", "index/artefact.py", "index/convert.py", "proxy/admin/operations.py"}
    assert readers <= {"proxy/commands/main.py", "proxy/settings/config.py"} | children


PROBE = """
import builtins, os, socket, sys, threading

def refuse(*_arguments, **_named):
    raise AssertionError("importing has an effect")

reading = builtins.open
def open_to_read(file, mode="r", *rest, **named):
    return refuse() if set(mode) & set("wax+") else reading(file, mode, *rest, **named)

environment = dict(os.environ, **{silence!r})  # its one change, see index.quiet
folder = os.getcwd()
builtins.open = open_to_read
socket.socket.connect = refuse
os.mkdir = os.makedirs = os.rename = os.unlink = refuse
for name in {names!r}:
    __import__(name)
assert dict(os.environ, **{silence!r}) == environment, "environment changed"
assert os.getcwd() == folder
ours = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
assert not ours, ours
print([name for name in {heavy!r} if name in sys.modules])
"""


def run_probe(names: list[str]) -> str:
    probe = PROBE.format(names=names, heavy=HEAVY, silence=SILENCE)
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


WAITS = {"timeout", "wait_for", "wait", "until", "join"}  # the last argument, or one called `timeout`, is a time
CLOCKS = {"monotonic", "perf_counter", "time"}


def hurried(tree: ast.Module) -> Iterator[str]:
    """Lines of a test that a busy machine could fail: a wait for less than a minute, a time that is to be short."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            times = [keyword.value for keyword in node.keywords if keyword.arg in ("timeout", "within_s")]
            times += node.args[-1:] if name in WAITS else []
            if any(isinstance(time, ast.Constant) and isinstance(time.value, int | float) and time.value < 60
                   for time in times):  # fmt: skip
                yield f"{node.lineno}: {ast.unparse(node)[:90]}"
        elif isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare):
            read = [getattr(call.func, "attr", "") for call in ast.walk(node.test) if isinstance(call, ast.Call)]
            bounds = zip(node.test.ops, node.test.comparators, strict=True)
            if CLOCKS & set(read) and any(isinstance(op, ast.Lt | ast.LtE) and isinstance(bound, ast.Constant)
                                          for op, bound in bounds):  # fmt: skip
                yield f"{node.lineno}: {ast.unparse(node)[:90]}"


def test_no_test_is_in_a_hurry() -> None:
    """Deadlines are `tests.waiting.PATIENCE_S`; what is to be in time is told by an order of events or a clock of its
    own (tests/README.md)."""
    found = {}
    for path in own_files(ROOT / "tests"):
        if "bench" not in path.parts and (lines := list(hurried(ast.parse(path.read_text())))):
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


def test_the_search_for_hurried_tests_finds_them() -> None:
    for line in (
        "asyncio.timeout(5)",
        "await asyncio.wait_for(event.wait(), 1.0)",
        "await until(lambda: seen, 10)",
        "subprocess.run([], timeout=30)",
        "process.wait(timeout=5)",
        "assert time.monotonic() - began < 0.2",
        "assert 1 < loop.time() - began <= 4",
    ):
        assert list(hurried(ast.parse(line))), line
    for line in (
        "asyncio.timeout(PATIENCE_S)",
        "await event.wait()",
        "subprocess.run([], timeout=300)",
        "assert time.monotonic() - began > 1",
        "Upstreams(timeout_s=1)",
    ):
        assert not list(hurried(ast.parse(line))), line


def test_importing_every_module_has_no_effect_and_loads_no_torch() -> None:
    names = [name for name in modules("proxy") + modules("index") if not name.endswith("__main__")]
    loaded = run_probe(names)
    assert "torch" not in loaded
    assert "sentence_transformers" not in loaded


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    assert run_probe(["proxy.commands.main"]).strip() == "[]"


@pytest.mark.parametrize(
    ("folders", "extras"),
    [(("proxy", "index", "migrations"), ("otel", "codings")), (("tests", "deploy"), ("test",))],
    ids=["product", "tests"],
)
def test_every_third_party_import_is_a_declared_dependency(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    owners = packages_distributions()
    known = declared(*extras)
    undeclared = {}
    # run in the environments of the clients they drive
    elsewhere = {ROOT / f"tests/conformance/{name}.py" for name in ("driver", "loops")}
    for path in (path for folder in folders for path in own_files(ROOT / folder) if path not in elsewhere):
        for top in {name.partition(".")[0] for name in imported(path)} - OURS - sys.stdlib_module_names:
            if not {normalised(owner) for owner in owners.get(top, [top])} & known:
                undeclared[top] = str(path.relative_to(ROOT))
    assert undeclared == {}


def test_constraints_pin_what_is_installed_here() -> None:
    """What was tested is what is written down, for everything the product and its tests declare."""
    from importlib.metadata import version

    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pins = {normalised(name): pin for name, _, pin in (line.partition("==") for line in lines if "==" in line)}
    for name in declared("test", "lint"):
        assert pins[name] == version(name).partition("+")[0], name


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_lower_bounds_are_not_above_what_was_tested() -> None:
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pins = {normalised(name): pin for name, _, pin in (line.partition("==") for line in lines if "==" in line)}
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *extras["test"], *extras["lint"]]:
        name, bound = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[.*?\])?[>=]=([\d.]+).*", requirement).groups()  # type: ignore[union-attr]
        assert numbers(bound) <= numbers(pins[normalised(name)]), requirement


def machine_traces(text: str) -> Iterator[str]:
    yield from re.findall(r"(?<![\w.])/(?:root|work|opt/(?!ibid\b)[a-z]+|home/(?!ann\b|ibid\b)\w+)/\S*", text)


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    found = {}
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" in raw or path == Path(__file__):
            continue
        if traces := list(machine_traces(raw.decode(errors="replace"))):
            found[str(path.relative_to(ROOT))] = traces[:3]
    assert found == {}


def test_the_search_for_machine_paths_finds_them() -> None:
    assert list(machine_traces("see /root/x and '/work/main/a.py' and /home/bob/y")) == [
        "/root/x",
        "/work/main/a.py'",
        "/home/bob/y",
    ]
    assert list(machine_traces("https://host/work/x, ./work/y, /var/lib/ibid")) == []


def test_the_wheel_holds_the_packages_the_migrations_the_manual_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build in the checkout would leave its own folders behind
    files = tracked()
    needed = ("proxy/", "index/", "migrations/", "deploy/docs/", "pyproject.toml", "LICENSE", "README.md")
    for path in files:
        if str(path.relative_to(ROOT)).startswith(needed):
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*build, "-w", str(tmp_path), str(source)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("ibid_proxy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "ibid = proxy.commands.main:main" in archive.read(entry_points).decode()
    ours = (
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix == ".py" or path.is_relative_to(ROOT / "deploy/docs")
    )
    shipped = (name for name in ours if not name.startswith("tests/") and not re.match(r"deploy/(?!docs/)", name))
    expected = {re.sub(MAPPED, lambda name: f"proxy/_{name[1]}", name) for name in shipped}
    expected |= {"proxy/py.typed", "index/py.typed", "index/answers.json", "proxy/_migrations/script.py.mako"}
    guard = (str(path.relative_to(ROOT)) for path in files if path.is_relative_to(ROOT / "index" / "guard"))
    expected |= {f"proxy/admin/dashboard/{file.name}" for file in (ROOT / "proxy/admin/dashboard").iterdir()}
    expected |= {name for name in guard if "/data/" in name or name.endswith(".safetensors")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("/licenses/LICENSE") for name in names)
