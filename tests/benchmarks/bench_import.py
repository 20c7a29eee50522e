"""How long an import of the library takes, beside that of torch, which it needs: printed, and nothing is stored."""

import statistics
import subprocess
import sys
import time

RUNS = 5


def seconds(module):
    """The median time of a new process that imports one module."""
    took = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def bench_import(capsys):
    """Print the two times and their ratio, which should be at most 1.5."""
    torch, library = seconds("torch"), seconds("icl_lib")
    with capsys.disabled():
        print(f"\nimport torch: {torch:.2f} s, import icl_lib: {library:.2f} s, ratio {library / torch:.2f}")
