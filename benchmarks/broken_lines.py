"""Claim: tests notice broken code. Ten statements at random are broken, one at a time, and the suite is run each time.

A statement of common/, client/ or server/ is chosen by a seeded draw among all assignments, returns, raises, calls
and conditions, and broken: a condition is negated, a return gives None, anything else is left out. Docstrings and
imports are never chosen. The work is done in a copy of the source tree.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import options, show

ROOT = Path(__file__).parents[1]
PARTS = ("common", "client", "server")


def candidates(source: str) -> list[ast.stmt]:
    """Return the statements that may be broken."""
    kinds = (ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.If, ast.While, ast.Expr)
    found: list[ast.stmt] = []
    for parent in ast.walk(ast.parse(source)):
        if not isinstance(parent, ast.FunctionDef | ast.For | ast.While | ast.If | ast.With | ast.Try):
            continue
        for node in parent.body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, kinds) and not is_text:
                found.append(node)
    return found


def broken(source: str, node: ast.stmt) -> str:
    """Return the source with one statement broken."""
    lines = source.splitlines(keepends=True)
    indent = lines[node.lineno - 1][: node.col_offset]
    if isinstance(node, ast.If | ast.While):
        test = ast.get_source_segment(source, node.test) or "True"
        word = "if" if lines[node.lineno - 1].lstrip().startswith(("if", "elif")) else "while"
        word = "elif" if lines[node.lineno - 1].lstrip().startswith("elif") else word
        new = f"{indent}{word} not (\n{indent}    {test}\n{indent}):\n"
        body_start = node.body[0].lineno
        return "".join([*lines[: node.lineno - 1], new, *lines[body_start - 1 :]])
    new = f"{indent}return None\n" if isinstance(node, ast.Return) else f"{indent}pass\n"
    return "".join([*lines[: node.lineno - 1], new, *lines[(node.end_lineno or node.lineno) :]])


def noticed(tree: Path) -> str | None:
    """Run the suite in `tree`; return the first failing test, or None when all pass."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else "collection"


def main() -> None:
    arguments = options(__doc__)
    wanted = 1 if arguments.quick else 10
    chance = random.Random(0)
    files = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))
    every = [(path, node) for path in files for node in candidates(path.read_text())]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        skip = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache", "*.egg-info", "build", "dist")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)
        for path, node in chance.sample(every, wanted):
            relative = path.relative_to(ROOT)
            source = path.read_text()
            (tree / relative).write_text(broken(source, node))
            by = noticed(tree)
            (tree / relative).write_text(source)
            text = source.splitlines()[node.lineno - 1].strip()[:50]
            rows.append((f"{relative}:{node.lineno}", text, by or "not noticed"))
            print(*rows[-1], sep=" | ", file=sys.stderr)
    caught = sum(row[2] != "not noticed" for row in rows)
    figures = {"broken": len(rows), "noticed": caught, "lines": [list(row) for row in rows]}
    show(
        f"{caught} of {len(rows)} broken lines noticed",
        ("where", "line", "first failing test"),
        rows,
        figures,
        arguments.json,
    )


if __name__ == "__main__":
    main()
