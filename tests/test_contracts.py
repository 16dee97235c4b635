"""Rules about the repository itself: who imports whom, what an import costs, what the README lists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Each layer may import itself and what stands after it. A name counts before a pattern with a star.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("el4ner.__main__",),
    ("el4ner.cli*", "el4ner.show", "el4ner.doctor", "el4ner.bench*"),
    ("el4ner",),
    ("el4ner.pipeline*",),
    # what the pipeline does once, before the stages run
    (
        "el4ner.preparation",
        "el4ner.audition",
        "el4ner.weighing",
        "el4ner.fitted",
        "el4ner.operating",
        "el4ner.shipped",
        "el4ner.choosing",
        "el4ner.crossfit",
        "el4ner.examining",
    ),
    ("el4ner.plan",),
    ("el4ner.stages*",),
    ("el4ner.voters*",),
    # files and settings: from pools and what is built on files down to lines
    ("el4ner.pool", "el4ner.grouping", "el4ner.metrics"),
    ("el4ner.config",),
    ("el4ner.labels", "el4ner.corpora", "el4ner.config_errors"),
    ("el4ner.jsonl", "el4ner.documents"),
    ("el4ner.output",),
    ("el4ner.lines",),
    # pure text: what is asked and what an answer means
    ("el4ner.paper_prompts",),
    ("el4ner.prompts", "el4ner.calibration"),
    ("el4ner.decoding",),
    ("el4ner.parsing", "el4ner.alignment"),
    # models: how they run, where they are
    ("el4ner.engines*",),
    ("el4ner.models",),
    ("el4ner.conversion", "el4ner.hub"),
    # what all of these may know
    ("el4ner.interrupts", "el4ner.cache", "el4ner.engines.base", "el4ner.text", "el4ner.escaping", "el4ner.data"),
    ("el4ner.kernels*", "el4ner._native"),
    ("el4ner.records", "el4ner.errors"),
)
# Three groups of layers beside each other, which the order alone would let look down on the next.
BESIDE: dict[str, tuple[str, ...]] = {
    "files": ("el4ner.pool", "el4ner.grouping", "el4ner.metrics", "el4ner.config", "el4ner.config_errors",
              "el4ner.labels", "el4ner.corpora", "el4ner.jsonl", "el4ner.documents", "el4ner.output",
              "el4ner.lines"),
    "text": ("el4ner.paper_prompts", "el4ner.prompts", "el4ner.calibration", "el4ner.decoding", "el4ner.parsing",
             "el4ner.alignment"),
    "models": ("el4ner.engines*", "el4ner.models", "el4ner.conversion", "el4ner.hub"),
}  # fmt: skip


def tracked(root: Path) -> list[str]:
    """Files under version control, new ones that git does not ignore included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return sorted(name for name in done.stdout.splitlines() if (root / name).is_file())


def module_of(path: str) -> str | None:
    """The installed name of a source file of the package; None for tests and setup.py."""
    parts = Path(path).with_suffix("").parts
    if parts[0] in ("kernels", "bench"):
        parts = ("el4ner", *parts)
    if parts[0] != "el4ner":
        return None
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(module: str, source: str, names: set[str]) -> set[str]:
    """Modules of el4ner that a file imports, wherever in it; imports for type checkers only do not count."""
    tree = ast.parse(source)
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for part in block.body
        for node in ast.walk(part)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import; write it in full"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in names else str(node.module) for name in inner}
    return {name for name in found if name.split(".")[0] == "el4ner"} - {module}


def matches(module: str, pattern: str) -> bool:
    """Whether a module is the pattern; with a star, or starts like it."""
    return module == pattern or (pattern.endswith("*") and module.startswith(pattern[:-1]))


def layer(module: str) -> int:
    """Number of a module's layer, counted from the command line downwards."""
    for number, names in enumerate(LAYERS):
        if module in names:
            return number
    for number, patterns in enumerate(LAYERS):
        if any(matches(module, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"{module} is in no layer; give it one in LAYERS")


def group(module: str) -> str | None:
    """Which of the groups in BESIDE a module belongs to; engines.base, the requests, is everybody's."""
    if module == "el4ner.engines.base":
        return None
    return next((g for g, names in BESIDE.items() if any(matches(module, name) for name in names)), None)


def forbidden(module: str, imported: str) -> str | None:
    """Why a module may not import another one; None if it may."""
    if module.startswith("el4ner.kernels"):
        known = imported.startswith(("el4ner.kernels", "el4ner.errors", "el4ner._native"))
        return None if known else "kernels import only el4ner.errors"
    if layer(imported) < layer(module):
        return "imports run cli -> pipeline -> stages -> voters -> files, text, models -> records"
    own, other = group(module), group(imported)
    if own is not None and other is not None and own != other:
        return f"{own} and {other} stand beside each other; a voter or stage brings them together"
    if (
        module.startswith("el4ner.stages")
        and imported.startswith("el4ner.engines.")
        and imported != "el4ner.engines.base"
    ):
        return "a stage knows requests (engines.base), not how models run"
    return None


def broken_arrows(sources: dict[str, str]) -> list[str]:
    """Imports that run against the order. sources: module name -> its text."""
    broken = []
    for module, source in sources.items():
        for imported in sorted(imports_of(module, source, {*sources, "el4ner._native"})):
            reason = forbidden(module, imported)
            if reason is not None:
                broken.append(f"{module} -> {imported}: {reason}")
    return broken


def test_imports_run_one_way(root: Path) -> None:
    files = {name: module_of(name) for name in tracked(root) if name.endswith(".py")}
    sources = {module: (root / name).read_text(encoding="utf-8") for name, module in files.items() if module}
    assert broken_arrows(sources) == []


def test_broken_arrows_are_named() -> None:
    sources = {
        "el4ner.records": "import el4ner.prompts",
        "el4ner.prompts": "from el4ner import records",
        "el4ner.kernels.vote": "from el4ner.errors import ShapeError\nfrom el4ner import records",
        "el4ner.stages.verify": "def f():\n    from el4ner.engines import scripted",
        "el4ner.engines.scripted": "from el4ner.voters import reading",
        "el4ner.voters.reading": "from el4ner import pool, prompts\nfrom el4ner.engines.base import Engine",
        "el4ner.engines.tokens": "from el4ner.engines import base\nfrom el4ner import prompts, jsonl, cache",
        "el4ner.engines.base": "import el4ner.engines.tokens",
        "el4ner.config": "from el4ner import documents, pool",
        "el4ner.pool": "from el4ner import config, models\nfrom el4ner.prompts import prefix",
        "el4ner.jsonl": "from el4ner.engines.base import Prompt\nfrom el4ner.engines import tokens",
        "el4ner.lines": "import el4ner.jsonl",
        "el4ner.parsing": "import el4ner.prompts",
        "el4ner.cache": "import el4ner.config",
        "el4ner.models": "from el4ner import cache, conversion, text",
        "el4ner.documents": "",
        "el4ner.conversion": "",
        "el4ner.text": "",
        "el4ner.errors": "",
    }
    arrows = [line.split(":")[0] for line in broken_arrows(sources)]
    assert arrows == [
        "el4ner.records -> el4ner.prompts",
        "el4ner.kernels.vote -> el4ner.records",
        "el4ner.stages.verify -> el4ner.engines.scripted",
        "el4ner.engines.scripted -> el4ner.voters.reading",
        "el4ner.engines.tokens -> el4ner.jsonl",
        "el4ner.engines.tokens -> el4ner.prompts",
        "el4ner.engines.base -> el4ner.engines.tokens",
        "el4ner.config -> el4ner.pool",
        "el4ner.pool -> el4ner.models",
        "el4ner.pool -> el4ner.prompts",
        "el4ner.jsonl -> el4ner.engines.tokens",
        "el4ner.lines -> el4ner.jsonl",
        "el4ner.parsing -> el4ner.prompts",
        "el4ner.cache -> el4ner.config",
    ]


def run_python(code: str, cwd: Path) -> str:
    """What a fresh interpreter prints, started elsewhere so that the checkout is not on its path."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "textblob", "numba", "triton", "datasets")


@pytest.mark.parametrize("module", ["el4ner", "el4ner.cli"])
def test_import_is_light_and_sets_no_environment(module: str, tmp_path: Path) -> None:
    code = f"""
import os, sys
before = dict(os.environ)
import {module}
print([name for name in {HEAVY!r} if name in sys.modules], dict(os.environ) == before)
"""
    assert run_python(code, tmp_path) == "[] True"


def test_compilers_are_imported_when_one_of_their_kernels_runs(tmp_path: Path) -> None:
    code = """
import sys
import numpy as np
from el4ner.kernels import vote
loaded = lambda: [name for name in ("numba", "triton", "torch") if name in sys.modules]
before, halves = loaded(), np.log(np.full((2, 3, 2), 0.5, np.float32))
ref = vote(halves, np.ones(2), backend="ref")
between = loaded()
numba = vote(halves, np.ones(2), backend="numba")
print(before, between, loaded(), all(np.array_equal(a, b) for a, b in zip(ref, numba)))
"""
    assert run_python(code, tmp_path) == "[] [] ['numba'] True"


def test_kernels_is_not_a_top_level_module(root: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    assert str(root) not in run_python(code, tmp_path)
    # and what is installed as el4ner.kernels is this checkout's folder, as a link or a copy
    code = "import importlib.util as u; print(u.find_spec('el4ner.kernels.vote').origin)"
    installed = Path(run_python(code, tmp_path))
    assert installed.read_bytes() == (root / "kernels" / "vote.py").read_bytes()


def file_map(readme: str) -> dict[str, str]:
    """path -> description from the fenced block under `## File map`; lines are `path  description`."""
    found = re.search(r"^## File map\n.*?^```[a-z]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert found, "README.md has no fenced block under the heading `## File map`"
    rows: dict[str, str] = {}
    for line in found[1].splitlines():
        if line.strip():
            path, _, description = line.strip().partition(" ")
            assert path not in rows, f"README.md lists {path} twice"
            assert description.strip(), f"README.md does not say what {path} is for"
            rows[path] = description.strip()
    return rows


def test_readme_file_map_equals_the_tree(root: Path) -> None:
    listed = set(file_map((root / "README.md").read_text(encoding="utf-8")))
    files = tracked(root)
    missing_files = sorted(path for path in listed if not (root / path).exists())
    assert missing_files == [], "README.md lists what does not exist"
    sources = {f for f in files if f.endswith((".py", ".cpp", ".hpp")) and not f.startswith("tests/")}
    # An empty __init__.py holds nothing worth a line.
    sources = {f for f in sources if not (f.endswith("__init__.py") and (root / f).stat().st_size == 0)}
    assert sorted(sources - listed) == [], "README.md's file map lacks these"


def test_readme_names_every_instruction_set(root: Path) -> None:
    from el4ner.kernels._dispatch import INSTRUCTION_SETS

    assert f"EL4NER_ISA={'|'.join(INSTRUCTION_SETS)}" in (root / "README.md").read_text(encoding="utf-8")


def test_what_the_demo_writes_is_ignored_even_if_it_is_killed(root: Path) -> None:
    tracked(root)  # skips where there is no git
    names = ["demo-output.jsonl", "demo-output.jsonl.0123abcd.partial"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == names


def test_file_map_parser() -> None:
    readme = "# x\n## File map\n\nWords.\n\n```text\na.py   first\nb/     second one\n```\n\n```\nc.py no\n```\n"
    assert file_map(readme) == {"a.py": "first", "b/": "second one"}
    for wrong in ("# x\n", "## File map\n```\na.py\n```\n", "## File map\n```\na.py x\na.py y\n```\n"):
        with pytest.raises(AssertionError, match=r"README\.md"):
            file_map(wrong)


# Absolute paths below these belong to one machine. /usr, /opt, /etc, /proc and /tmp as such are common to all.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|Users|root|work|mnt|scratch)/\w|(?<![\w/])[A-Z]:\\\\Users")


def test_no_machine_paths(root: Path) -> None:
    home = str(root.parent) + "/"
    found = []
    for name in tracked(root):
        if name == "tests/test_contracts.py" or (root / name).suffix in (".gz", ".png"):
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line) or home in line:
                found.append(f"{name}:{number}")
    assert found == []


def test_every_package_is_listed_in_setup(root: Path) -> None:
    packages = {
        m if Path(f).name == "__init__.py" else m.rpartition(".")[0]
        for f in tracked(root)
        if f.endswith(".py") and (m := module_of(f))
    }
    listed = set(re.findall(r'^\s+"(el4ner[\w.]*)",$', (root / "setup.py").read_text(encoding="utf-8"), re.MULTILINE))
    assert packages - {""} <= listed


def test_pins_can_be_installed_on_every_python_that_is_promised(root: Path) -> None:
    """A pin whose package wants a later Python than the oldest one promised is for that Python only."""
    import importlib.metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    oldest = re.search(r'requires-python = ">=([\d.]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest is not None
    checked, wrong = 0, []
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            installed = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        checked += 1
        wants = installed.metadata.get("Requires-Python") or ""
        applies = pin.marker is None or pin.marker.evaluate({"python_version": oldest[1]})
        if applies and not SpecifierSet(wants).contains(f"{oldest[1]}.99"):
            wrong.append(f"{line}: wants Python {wants}")
    assert checked > 50
    assert wrong == []


def test_imports_are_declared_dependencies(root: Path) -> None:
    """What the package imports from elsewhere is named in pyproject.toml, not just pulled in by something else."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    declared = {name.lower().replace("-", "_") for name in re.findall(r'"([A-Za-z][\w.-]*)(?:>=|")', text)}
    declared |= {"yaml", "faiss"}  # PyYAML; faiss-cpu or faiss-gpu
    foreign: dict[str, str] = {}
    for name in tracked(root):
        if name.endswith(".py") and module_of(name):
            for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                foreign |= {m.split(".")[0]: name for m in modules}
    unknown = {m: f for m, f in foreign.items() if m not in sys.stdlib_module_names and m.lower() not in declared}
    unknown.pop("el4ner", None)
    assert unknown == {}
