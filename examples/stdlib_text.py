"""Write N characters of the Python standard library's own source to a file.

A text that every machine already has, long enough to measure on and full of real prose (module
docstrings) and code. It differs a little between Python versions, and so do figures measured on it.

    python examples/stdlib_text.py text.txt --chars 40000
"""

import argparse
import sysconfig
from pathlib import Path

# modules that open with long prose and have changed little for years
MODULES = ("heapq", "difflib", "textwrap", "statistics", "fractions", "doctest", "argparse")


def stdlib_text(chars: int) -> str:
    """The first `chars` characters of these modules, one after the other."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = ""
    for module in MODULES:
        text += (folder / f"{module}.py").read_text(encoding="utf-8") + "\n"
        if len(text) >= chars:
            return text[:chars]
    raise ValueError(f"{chars} characters were asked for; these modules hold {len(text)}")


def main() -> None:
    """Parse the arguments, write the file and say what was written."""
    parser = argparse.ArgumentParser(description="Write standard-library source to a file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--chars", type=int, default=40_000)
    arguments = parser.parse_args()
    try:
        text = stdlib_text(arguments.chars)
    except ValueError as error:
        parser.error(str(error))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.out}: {len(text):,} characters")


if __name__ == "__main__":
    main()
