"""Counts lines of Python code: without blank lines, comments and docstrings.

python experiments/examples/lines.py experiments/examples/*.py
git clone https://github.com/pytorch/examples && python experiments/examples/lines.py examples/vae/main.py
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)


def count(text: str) -> int:
    """The number of lines of code in the text of a Python file."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for token in tokens if token.type not in LAYOUT for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


if __name__ == "__main__":
    counts = {path: count(Path(path).read_text()) for path in sys.argv[1:]}
    for path, lines in counts.items():
        print(f"{lines:6} {path}")
    print(f"{sum(counts.values()):6} together")
