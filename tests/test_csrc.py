"""Test that no C++ or CUDA function is longer than a maximum."""

import re
from pathlib import Path

import pytest

COMPILED_SOURCES = sorted(
    path
    for path in (Path(__file__).resolve().parent.parent / "csrc").rglob("*")
    if path.suffix in (".cpp", ".cu", ".h")
)
LONGEST_FUNCTION = 80


def without_comments_and_literals(source: str) -> str:
    """Blank out comments, literals and preprocessor lines, so that braces can be counted; line numbers stay."""
    tokens = re.compile(
        r"//[^\n]*|/\*.*?\*/"  # comments
        r'|R"(?P<mark>[^()\s]*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\\n])*"'  # strings
        r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'"  # characters, but not digit separators
        r"|^[ \t]*#(?:\\\n|[^\n])*",  # preprocessor lines and their continuations
        re.DOTALL | re.MULTILINE,
    )
    return tokens.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def function_lengths(source: str) -> dict[str, int]:
    """Count the lines of every function in a C++ file, from its declaration (or `template`) to its closing brace.

    Functions inside namespaces and classes are counted too. A lambda counts as part of the function that contains it.
    """
    text = without_comments_and_literals(source)
    # A macro call on its own line, without a semicolon, is not part of the next declaration.
    text = re.sub(r"^[A-Z][A-Z_0-9]*\(.*\)$", lambda match: " " * len(match[0]), text, flags=re.MULTILINE)
    attributes = re.compile(r"\b(?:__\w+__|alignas)\s*\((?:[^()]|\([^()]*\))*\)")
    lengths: dict[str, int] = {}
    start = 0  # where the current declaration starts
    depth = 0  # nesting of braces in a function or initialiser; 0 between declarations
    parentheses = 0
    scopes: list[bool] = []  # for each open brace, whether it is a namespace or class
    for position, character in enumerate(text):
        if character in "()":
            parentheses += 1 if character == "(" else -1
        elif character == "{":
            head = attributes.sub("", text[start:position])
            opens_scope = depth == 0 and bool(re.search(r"\b(namespace|class|struct|union|extern)\b[^()]*$", head))
            scopes.append(opens_scope)
            if opens_scope:
                start = position + 1
            else:
                depth += 1
        elif character == "}":
            assert scopes, f"closing brace without an opening one in line {text.count(chr(10), 0, position) + 1}"
            if not scopes.pop():
                depth -= 1
                # In `member{value}, other(value) {` the function's body has not started yet.
                if depth == 0 and parentheses == 0 and not re.match(r"\s*[,{;]", text[position + 1 : position + 200]):
                    declaration = text[start : position + 1].lstrip()
                    name = re.search(r"([\w~]+|operator\W+)\s*\(", attributes.sub("", declaration))
                    if name:
                        line = text.count("\n", 0, position + 1 - len(declaration)) + 1
                        lengths[f"{name[1]} in line {line}"] = declaration.count("\n") + 1
                    start = position + 1
            else:
                start = position + 1
        elif character == ";" and depth == 0 and parentheses == 0:
            start = position + 1
    assert not scopes, "opening brace without a closing one"
    return lengths


def test_lengths_of_cpp_functions_are_measured() -> None:
    source = """
#define TWICE(x) \\
  void x##_twice() {

namespace a {  // {
struct alignas(16) Pair {
  Pair(int x) : first{x}, second(x) {
    f("}", '{');
  }
  int first = 1'000, second{2};
};
TWICE(f)

template <typename T>
int sum(
    T count) {
  /* } */
  auto add = [](int x) { return x; };
  if (count) {
    return add(1);
  }
}
constexpr int kNumbers[] = {1, 2};
}
__global__ void __launch_bounds__(f(4)) kernel(int x) {
}
REGISTER(library, m) {
}
"""
    assert function_lengths(source) == {
        "Pair in line 7": 3,
        "sum in line 14": 9,
        "kernel in line 25": 2,
        "REGISTER in line 27": 2,
    }


@pytest.mark.parametrize("path", COMPILED_SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_cpp_functions_are_short(path: Path) -> None:
    too_long = {name: lines for name, lines in function_lengths(path.read_text()).items() if lines > LONGEST_FUNCTION}
    assert not too_long, f"{path}: functions longer than {LONGEST_FUNCTION} lines: {too_long}"
