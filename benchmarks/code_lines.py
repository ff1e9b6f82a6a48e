"""Count the lines of the package: `python -m benchmarks.code_lines [FOLDER or COMMIT ...]`, by default this checkout.

A code line is a line of a Python file with a token that is neither a comment nor part of a docstring. Recipes count as
lines, not as code. A public name is a class, function or method without a leading underscore in its own name or in the
names of the classes around it.
"""

import argparse
import ast
import io
import statistics
import subprocess
import tarfile
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fastssl"
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """Counts of one Python file.

    Args:
        lines: Number of lines.
        code: Number of code lines.
        functions: Number of code lines of each function and method, signature included.
        docstrings: Number of docstring lines of each public name, 0 if it has none.
    """

    lines: int
    code: int
    functions: list[int]
    docstrings: list[int]


def read_folder(folder: Path) -> dict[str, str]:
    """Read the package's Python files and recipes in a checkout, and return their text by path."""
    files = sorted((folder / PACKAGE).rglob("*"))
    return {str(path.relative_to(folder)): path.read_text() for path in files if _is_counted(path.name)}


def read_commit(commit: str) -> dict[str, str]:
    """Read the package's Python files and recipes at a commit, and return their text by path.

    Raises:
        ValueError: Git does not know the commit, or it does not contain the package.
    """
    archive = subprocess.run(["git", "archive", commit, PACKAGE], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        raise ValueError(f"{commit}: {archive.stderr.decode().strip()}")
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        for member in files:
            if (content := files.extractfile(member)) is not None and _is_counted(member.name):
                texts[member.name] = content.read().decode()
    return texts


def count(text: str) -> Module:
    """Count the lines of one Python file, given as text."""
    tree = ast.parse(text)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Module | Definition):
            code -= set(_docstring(node))
    functions = [
        len(code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    docstrings = [len(_docstring(node)) for node in _public(tree)]
    return Module(len(text.splitlines()), len(code), functions, docstrings)


def report(texts: Mapping[str, str]) -> str:
    """Return Markdown tables with the counts of a package, given the text of its files by path."""
    modules = {path: count(text) for path, text in texts.items() if path.endswith(".py")}
    recipes = {path: len(text.splitlines()) for path, text in texts.items() if path.endswith(".yaml")}
    folders: dict[str, list[Module]] = {}
    for path, module in modules.items():
        folders.setdefault("/".join(path.split("/")[1:-1][:1]) or "(top)", []).append(module)
    lines = ["| folder | files | lines | code |", "|---|---|---|---|"]
    lines += [_row(name, len(found), _lines(found), _code(found)) for name, found in sorted(folders.items())]
    lines.append(_row("recipes", len(recipes), sum(recipes.values()), 0))
    everything = list(modules.values())
    files = len(modules) + len(recipes)
    lines.append(_row("**all**", files, _lines(everything) + sum(recipes.values()), _code(everything)))
    functions = [length for module in everything for length in module.functions]
    docstrings = [length for module in everything for length in module.docstrings]
    longest = sorted(modules, key=lambda path: -modules[path].lines)[:10]
    lines += [
        "",
        f"Modules: {len(modules)}. "
        f"Functions: {len(functions)}, median length {statistics.median(functions):g} code lines.",
        f"Public names: {len(docstrings)}, with {sum(docstrings) / len(docstrings):.2f} docstring lines each "
        f"({sum(length == 0 for length in docstrings)} without).",
        "",
        "| longest files | lines | code |",
        "|---|---|---|",
        *(f"| {path} | {modules[path].lines} | {modules[path].code} |" for path in longest),
    ]
    return "\n".join(lines)


def _row(name: str, files: int, lines: int, code: int) -> str:
    return f"| {name} | {files} | {lines:,} | {code:,} |"


def _lines(modules: list[Module]) -> int:
    return sum(module.lines for module in modules)


def _code(modules: list[Module]) -> int:
    return sum(module.code for module in modules)


def _is_counted(name: str) -> bool:
    return name.endswith((".py", ".yaml"))


def _docstring(node: ast.Module | Definition) -> range:
    """Return the line numbers of a node's docstring; empty if it has none."""
    if ast.get_docstring(node, clean=False) is None:
        return range(0)
    first = node.body[0]
    return range(first.lineno, (first.end_lineno or first.lineno) + 1)


def _public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Yield the public classes, functions and methods of a module."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from _public(child)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", default=[str(ROOT)], help="folders of checkouts, or commits, to count")
    for tree in parser.parse_args().trees:
        try:
            texts = read_folder(Path(tree)) if (Path(tree) / PACKAGE).is_dir() else read_commit(tree)
        except ValueError as error:
            parser.error(str(error))
        print(f"{tree}\n\n{report(texts)}\n")


if __name__ == "__main__":
    main()
