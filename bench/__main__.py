"""``python -m bench``: every measurement that needs no stack, one after the other."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "bench.picker",
    "bench.gateway",
    "bench.sidecar",
    "bench.store",
    "bench.collector",
    "bench.answers",
    "bench.autoscaling",
)


def main() -> int:
    for module in MODULES:
        print(f"== {module}", flush=True)
        if code := subprocess.run([sys.executable, "-m", module], check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
