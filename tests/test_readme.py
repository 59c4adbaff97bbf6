"""The README tells the truth: its code runs, its tables are what catalogue and results say."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_runs(capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "turboquant4: layers 0-29" in printed
    assert "2.5 " in printed  # bits per element of kivi2-g64


def test_the_tables_are_generated():
    command = [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
