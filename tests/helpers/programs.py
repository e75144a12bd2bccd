# SPDX-License-Identifier: Apache-2.0
"""Programs as a user starts them: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(root: Path, *arguments: str | Path, cwd: Path, code: int = 0) -> str:
    """Run the project's Python with these arguments; its stdout, once the exit code is as expected."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
