"""Test which lines count as code, in a folder and at a commit."""

from pathlib import Path

import pytest

from benchmarks.code_lines import ROOT, count, read_commit, read_folder, report

_TEXT = '''"""A module.

With two paragraphs.
"""

import os  # one


class Shape:
    """Two lines
    of docstring."""

    #: Not code.
    sides: int = 3

    def area(self) -> float:
        # Why.
        return (
            1.0 +

            2.0
        )

    def _private(self) -> str:
        """Hidden."""
        return """a string
        is code"""


def plain() -> None: ...
'''


def test_blank_lines_comments_and_docstrings_are_not_code() -> None:
    module = count(_TEXT)
    assert module.lines == len(_TEXT.splitlines())
    # `import`, `class`, `sides`; `area`, whose expression spans four lines; `_private` with a two-line string; `plain`.
    assert module.code == 3 + 5 + 3 + 1
    assert module.functions == [1, 5, 3]
    # The public names: `Shape`, `area` and `plain`.
    assert module.docstrings == [2, 0, 0]


def test_a_folder_is_counted_by_package_folder(tmp_path: Path) -> None:
    for name, text in {
        "__init__.py": "x = 1\n",
        "nn/deep/one.py": _TEXT,
        "nn/two.py": "def f() -> int:\n    return 1\n",
        "recipes/a.yaml": "# comment\na: 1\n",
        "nn/README.md": "not counted\n",
    }.items():
        path = tmp_path / "fastssl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    lines = len(_TEXT.splitlines())
    found = report(read_folder(tmp_path))
    assert "| (top) | 1 | 1 | 1 |" in found
    assert f"| nn | 2 | {lines + 2} | 14 |" in found
    assert "| recipes | 1 | 2 | 0 |" in found
    assert f"| **all** | 4 | {lines + 5} | 15 |" in found
    assert "Modules: 3. Functions: 4, median length 2.5 code lines." in found
    assert "Public names: 4, with 0.50 docstring lines each (3 without)." in found
    assert found.splitlines()[-3] == f"| fastssl/nn/deep/one.py | {lines} | 12 |"


def test_a_commit_is_read_without_checking_it_out() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    texts = read_commit("HEAD")
    assert "fastssl/packing.py" in texts
    assert "fastssl/recipes/wav2vec2-tiny.yaml" in texts
    with pytest.raises(ValueError, match="no-such-commit"):
        read_commit("no-such-commit")
