"""`python -m tests.cookbook`: make the official cookbook's environment if need be, and run its loops in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cookbook.running import COOKBOOK, ENVIRONMENT, ROOT, make_environment

if __name__ == "__main__":
    print(f"installing {COOKBOOK} into {ENVIRONMENT}")
    make_environment()
    tests = Path(__file__).with_name("test_loops.py")
    sys.exit(
        subprocess.run(
            [sys.executable, "-m", "pytest", str(tests), *sys.argv[1:]], cwd=ROOT, check=False
        ).returncode
    )
