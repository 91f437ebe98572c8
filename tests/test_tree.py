"""The shape of the repository: links, mapping, guards, walls, and what never appears in it."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("model", "param_server", "workers")
INSIDE = ("bench", "chaos", "cluster", "commands", "controller", "monitor", "simulation")
"""Packages that lie in distbelief/ itself."""

REQUIRED_ENTRIES = {
    *("distbelief", "model", "workers", "param_server", "deploy", "tests", "docs"),
    *("LICENSE", "Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt"),
}
OPTIONAL_ENTRIES = {"SECURITY.md"}

CONTRACTS = {
    "No arrow runs upward",
    "Workers use the client side of the parameter server only",
    "The rules are pure: no sockets, threads, processes or clocks",
    "Only the files called ray_* know Ray",
    "A shard loads no terminal and no cluster code",
    "The controller's process is there in a moment",
    "The monitor's process is there in a moment",
    "Only the monitor's http knows the web server",
    "What answers over HTTP knows no server: it is given a request and returns bytes",
    "Models know nothing of training",
}

# Whatever turns bytes from outside into running code, or is half of that. Methods called eval are
# torch's, and re.compile compiles no program. Objects of multiprocessing travel as pickles.
RUNS_FOREIGN_CODE = re.compile(
    r"\b(?:c?[pP]ickle|cloudpickle|dill|joblib|shelve|marshal|jsonpickle|allow_pickle)\b"
    r"|\b(?:recv_pyobj|send_pyobj|recv_serialized|load_state_dict_from_url|read_pickle)\b"
    r"|\btorch\.(?:load|save|package|hub)\b|\b(?:np|numpy)\.(?:load|save|savez|lib\.format)\b"
    r"|\byaml\.(?:load|unsafe_load|full_load)\(|\bos\.(?:system|popen)\b|\bshell ?= ?True"
    r"|\bmultiprocessing\b|(?<!\.)\b(?:eval|exec|compile)\("
)
# From 3.12 an f-string comes in pieces, of which the middle ones are words.
STRING_TOKENS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
IMPORTS_RAY = re.compile(r"^\s*(?:import|from)\s+ray\b", re.MULTILINE)
BINDS_EVERYWHERE = re.compile(r"tcp://\*|0\.0\.0\.0|tcp://\[?::\]?:")


def settings() -> dict[str, Any]:
    tool: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return tool


def sources() -> list[Path]:
    """Every Python file of the distribution, each once, under its real name."""
    found = [
        path
        for folder in ("distbelief", *LINKED)
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.resolve() == path  # before 3.13 rglob("*") may go through the links
    ]
    assert found
    return found


def code(path: Path) -> str:
    """The file's code on its own lines, without comments and strings."""
    kept: list[list[str]] = [[]]
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL):
            kept.append([])
        elif token.type in STRING_TOKENS:
            kept[-1].append('""')
        elif token.type not in (tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            kept[-1].append(token.string)
    # Names apart, the rest together: `import ray`, but `torch.load(`.
    lines = (" ".join(words) for words in kept)
    return "\n".join(re.sub(r" ?([.(]) ?", r"\1", line) for line in lines)


def strings(path: Path) -> Iterator[str]:
    """The file's string literals, without docstrings."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def where(pattern: re.Pattern[str], texts: dict[Path, str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path, text in texts.items()
        for match in pattern.finditer(text)
    ]


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_package_is_a_relative_link_to_its_top_level_folder(name: str):
    link = ROOT / "distbelief" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()
    assert not (ROOT / name).is_symlink()


def test_the_package_mapping_says_the_same_as_the_links():
    setuptools = settings()["setuptools"]
    links = {
        f"distbelief.{path.name}": os.path.normpath(path.parent / os.readlink(path))
        for path in (ROOT / "distbelief").iterdir()
        if path.is_symlink()
    }
    mapping = {name: str(ROOT / folder) for name, folder in setuptools["package-dir"].items()}
    inside = {f"distbelief.{name}": str(ROOT / "distbelief" / name) for name in INSIDE}
    assert mapping == {"distbelief": str(ROOT / "distbelief"), **inside, **links}
    assert sorted(setuptools["packages"]) == sorted(mapping)


def test_every_folder_of_sources_is_a_listed_package():
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    assert folders == {Path(folder) for folder in settings()["setuptools"]["package-dir"].values()}


@pytest.mark.parametrize("name", LINKED)
def test_a_bare_import_of_a_linked_package_is_refused(name: str):
    finished = python(f"import {name}")
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: import distbelief.{name}, not {name}")


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_package_loads_under_its_full_name(name: str):
    finished = python(f"import distbelief.{name}")
    assert finished.returncode == 0, finished.stderr


def test_the_top_level_holds_what_it_should_and_nothing_else():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked can not be asked")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = {name.split("/")[0] for name in listed.stdout.decode().split("\0") if name}
    if not tracked:
        pytest.skip("git tracks nothing yet")
    visible = {name for name in tracked if not name.startswith(".")}
    assert visible - OPTIONAL_ENTRIES == REQUIRED_ENTRIES


def test_importing_distbelief_loads_neither_torch_nor_ray_nor_click():
    finished = python(
        "import sys, distbelief; assert distbelief.__version__; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} "
        "& {'torch', 'numpy', 'ray', 'click', 'rich', 'zmq'}))"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "[]\n"


def test_no_source_can_run_foreign_code():
    assert where(RUNS_FOREIGN_CODE, {path: code(path) for path in sources()}) == []


def test_only_files_called_after_it_import_ray():
    others = [path for path in sources() if not path.name.startswith("ray_")]
    assert where(IMPORTS_RAY, {path: code(path) for path in others}) == []


def test_no_source_binds_to_every_interface():
    texts = {path: "\n".join(strings(path)) for path in sources()}
    assert where(BINDS_EVERYWHERE, texts) == []


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("import pickle", True),
        ("from multiprocessing.reduction import pickle as p", True),
        ("x = torch.load(path)", True),
        ("x = eval(text)", True),
        ("x = np.load(path)", True),
        ("torch.save(x, path)", True),
        ("from shelve import open", True),
        ("y = yaml.unsafe_load(text)", True),
        ("subprocess.run(text, shell=True)", True),
        ("subprocess.run(text, shell = True)", True),
        ("q = multiprocessing.Queue()", True),
        ("sock.recv_pyobj()", True),
        ("y = yaml.safe_load(text)", False),
        ("x = re.compile(text)", False),
        ("model.eval()", False),
        ("asyncio.create_subprocess_exec(program)", False),
        ("# no pickle on the wire", False),
        ('"""No pickle on the wire."""', False),
    ],
)
def test_the_search_for_foreign_code_finds_code_and_leaves_words_alone(
    tmp_path: Path, line: str, is_found: bool
):
    path = tmp_path / "source.py"
    path.write_text(f"{line}\n")
    assert bool(RUNS_FOREIGN_CODE.search(code(path))) == is_found


def test_the_contracts_of_the_walls_are_all_there():
    assert {contract["name"] for contract in settings()["importlinter"]["contracts"]} == CONTRACTS


def test_every_module_that_a_contract_names_exists():
    named = {
        name
        for contract in settings()["importlinter"]["contracts"]
        for key in ("layers", "source_modules", "forbidden_modules", "allowed_importers")
        for line in contract.get(key, [])
        for name in re.findall(r"distbelief[\w.]*", line)
    }
    missing = {
        name
        for name in named
        if not (ROOT / name.replace(".", "/")).is_dir()
        and not (ROOT / f"{name.replace('.', '/')}.py").is_file()
    }
    assert missing == set()
