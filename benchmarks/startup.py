"""Wall-clock time of `eckart --help` and `eckart methods`, each as a new process.

    python benchmarks/startup.py [RUNS]

Prints the least, median and greatest time of RUNS (default 20) runs, after one that warms the
file cache. Aim: --help within 0.3 s.
"""

import platform
import statistics
import subprocess
import sys
import time

COMMANDS = (["--help"], ["methods"], ["methods", "lora"])


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "eckart", *command], stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(f"Python {platform.python_version()}, {runs} runs: least, median, greatest [s]")
    for command in COMMANDS:
        seconds(command)
        times = [seconds(command) for _ in range(runs)]
        row = (min(times), statistics.median(times), max(times))
        print(f"eckart {' '.join(command):<16}" + "".join(f"{t:8.3f}" for t in row))


if __name__ == "__main__":
    main()
