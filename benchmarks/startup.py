# SPDX-License-Identifier: Apache-2.0
"""Start of a program to its first step: wall seconds from the start of the process until a step can begin, and its end.

Programs: qdarts/search.py and qdarts/train.py on digits and (where --data holds it) CIFAR-10, at the papers' sizes of
network. `seconds` end where the first batch is asked for, and are the goal's; their parts: `imports` is Python and the
modules until the flags are read; `data` is reading the images; `build` is the rest (network, cost, streams, run folder,
lazy imports). `step` is what the first step took from there on, which loads the kernels and computes a whole batch;
`done` is when it had ended. `slowest_imports` are seconds of `python -X importtime` by top-level package, own time.
One run of each warms the disk's cache, builds the native kernels where this machine has none, and does not count;
figures are medians of n. `kernels` says what that build costs once for a machine (`cold`, by n processes that find an
empty cache) and what finding the built ones costs (`warm`); null without a compiler.

    python benchmarks/startup.py [--data ROOT] --json benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GOAL = 6.0
PROGRAMS = ("search", "train")
MARK = "first step: "
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| +([\w.]+)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="where CIFAR-10 lies (default: digits alone)")
    parser.add_argument("--repeats", type=int, default=5, help="n, starts of each program that count")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats = 1
    return args


def main(argv: list[str] | None = None) -> int:
    """Start every program n times and deliver the figures."""
    args = parse(argv)
    if args.child:
        watch(*args.child)
    from benchmarks import measuring

    where = measuring.machine()
    with tempfile.TemporaryDirectory() as scratch:
        cases = {}
        for dataset in ("digits", *(["cifar10"] if args.data else [])):
            for program in PROGRAMS[:1] if args.smoke else PROGRAMS:
                command = command_of(program, dataset, args, Path(scratch))
                cases[f"{program} {dataset}"] = measure(command, args.repeats, warm=not args.smoke)
        kernels = None if args.smoke else compile_kernels(Path(scratch), args.repeats)
    result = {
        "schema": 2,
        "benchmark": "startup",
        "n": args.repeats,
        "goal": GOAL,
        "cases": cases,
        "kernels": kernels,
        "machine": where,
        "versions": measuring.versions(),
    }
    measuring.deliver(result, table(result), args.json)
    return 0


def command_of(program: str, dataset: str, args: argparse.Namespace, scratch: Path) -> list[str]:
    """A program with the flags of its full size on a data set, its runs in `scratch`."""
    flags = ["--dataset", dataset, "--runs", str(scratch)]
    if args.data:
        flags += ["--data", str(args.data)]
    if program == "train":
        flags += ["--arch", "PC_DARTS_cifar", "--wbits", "2", "--abits", "4"]
        flags += ["--no-auxiliary"] if dataset == "digits" else []
    if args.smoke:
        flags += ["--preset", "smoke"]
    return [str(ROOT / "qdarts" / f"{program}.py"), *flags]


def measure(command: list[str], repeats: int, warm: bool) -> dict[str, Any]:
    """Medians of `repeats` starts, with their parts, and the slowest imports of one start."""
    if warm:
        start(command)
    runs = [start(command) for _ in range(repeats)]
    found = {name: round(median(run[name] for run in runs), 3) for name in runs[0]}
    return {**found, "runs": [round(run["seconds"], 3) for run in runs], "slowest_imports": slowest_imports(command)}


def start(command: list[str]) -> dict[str, float]:
    """One start: seconds until its first step, their parts, and the step; RuntimeError where it ended before."""
    done = _run(command)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        raise RuntimeError(f"{' '.join(command)}: ended before its first step (code {done.returncode}):\n{done.stderr}")
    return json.loads(line.removeprefix(MARK))


def _run(command: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *options, __file__, "--child", repr(time.time()), *command]
    return subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def slowest_imports(command: list[str], count: int = 8) -> dict[str, float]:
    """Own seconds of the modules imported until the first step is done, by top-level package, the slowest first."""
    seconds: Counter[str] = Counter()
    for own, module in _IMPORT.findall(_run(command, "-X", "importtime").stderr):
        seconds[module.split(".")[0]] += int(own) / 1e6
    return {name: round(value, 3) for name, value in seconds.most_common(count)}


_LOAD = """
import time
from common.quant.kernels import native
start = time.perf_counter()
print(time.perf_counter() - start if native.library() else None)
"""


def compile_kernels(scratch: Path, repeats: int) -> dict[str, float] | None:
    """Medians of the seconds until the native kernels are loaded, with an empty cache and with a full one."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(repeats):
        for state in ("cold", "warm"):
            environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(scratch / f"kernels{number}")}
            command = [sys.executable, "-c", _LOAD]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
            if done.stdout.strip() == "None":
                return None
            found[state].append(float(done.stdout))
    return {state: round(median(seconds), 4) for state, seconds in found.items()}


def watch(begun: str, script: str, *arguments: str) -> NoReturn:
    """In the process that is timed: run a program until its first step is done, say when what was, and end.

    `begun` is the wall clock at the start of the process.
    """
    sys.argv = [script, *arguments]
    seconds: dict[str, float] = {}
    import common.engine.cli as cli

    resolve = cli.resolve

    def resolved(*given: Any, **options: Any) -> Any:
        config = resolve(*given, **options)
        _hook(seconds, float(begun))
        return config

    cli.resolve = resolved
    runpy.run_path(script, run_name="__main__")
    sys.exit("the program ended before its first step")


def _hook(seconds: dict[str, float], begun: float) -> None:
    """Once the flags are read: note the time, and wrap the reading of the data, the first batch and the first step."""
    import common.data.streams as streams
    import common.recipes.setup as setup

    if Path(sys.argv[0]).stem == "search":  # the other loop is no part of this start
        from common.engine.search_loop import SearchLoop as Loop
    else:
        from common.engine.train_loop import _Training as Loop
    imported = time.time() - begun
    load, batch, one_step = setup.load, streams.Stream.batch, Loop.one_step

    def timed_load(*given: Any, **options: Any) -> Any:
        start = time.time()
        data = load(*given, **options)
        seconds["data"] = time.time() - start
        return data

    def noted_batch(*given: Any) -> Any:
        seconds.setdefault("seconds", time.time() - begun)
        return batch(*given)

    def only_step(loop: Any) -> NoReturn:
        one_step(loop)
        finish_device()
        done = time.time() - begun
        build = seconds["seconds"] - imported - seconds["data"]
        parts = {"imports": imported, "build": build, "step": done - seconds["seconds"], "done": done}
        print(MARK + json.dumps({**seconds, **parts, "cpu": time.process_time()}), flush=True)
        os._exit(0)

    setup.load, streams.Stream.batch, Loop.one_step = timed_load, noted_batch, only_step


def finish_device() -> None:
    """Wait for what a GPU still has to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    n, goal = result["n"], result["goal"]
    rows = [
        f"wall seconds until the first step can begin (goal {goal:.0f}) and until it is done, medians of n = {n}",
        "",
    ]
    columns = {"can begin": "seconds", "imports": "imports", "data": "data", "build": "build"}
    columns |= {"the step itself": "step", "done": "done", "CPU seconds": "cpu"}
    # figures taken before a column was there stand without it
    columns = {name: part for name, part in columns.items() if all(part in case for case in result["cases"].values())}
    rows += [f"| program | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, case in result["cases"].items():
        rows.append(f"| {name} | {' | '.join(f'{case[part]:.2f}' for part in columns.values())} |")
    if result.get("kernels") is not None:
        cold, warm = result["kernels"]["cold"], result["kernels"]["warm"]
        rows.append(
            f"\nnative kernels: {cold:.1f} s to build, once for a machine; {1000 * warm:.0f} ms to load them later"
        )
    for name, case in result["cases"].items():
        slowest = ", ".join(f"{module} {seconds:.2f}" for module, seconds in case["slowest_imports"].items())
        rows.append(f"\n{name}, own seconds by package: {slowest}")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
