"""`fmtune predict` on a long table beside the bare model on tensors in memory, and the memory that it takes.

    python benchmarks/predict.py [--rows 1000000] [--format parquet|csv] [--rounds 3]

Trains the default network for one epoch on the bundled sample, and writes its images over and over to a table of the
rows asked for and to one of a fifth of them, in a temporary folder. Then, in turn: the bare model, in this process on
all cores, on images that lie in memory; and the command on either table, each in a process of its own. What the longer
table takes beyond the shorter one gives the images a second of a long run; what is left of the shorter one's time is
the start. Memory is the most that the command and all processes below it held together at one time, looked at twice a
second: their proportional set sizes, which count what they share once (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

import fmtune
from fmtune.checkpoint import TrainedModel
from fmtune.datasets import read_named

BATCHES = (64, 256, 1024)
"""Sizes of the bare model's batches, of which the fastest counts."""
BARE_IMAGES = 60_000
GROUP = 50_000
"""Rows of a write, and so of a row group."""


def write_table(path: Path, images: NDArray[np.uint8], rows: int) -> Path:
    """A table of labelled images: Parquet with a column of bytes an image, or a CSV as Kaggle has Fashion-MNIST."""
    pixels = np.resize(images, (GROUP, images[0].size))
    columns: dict[str, object] = {"label": np.zeros(GROUP, np.int64)}
    if path.suffix == ".csv":
        table = pa.table(columns | {f"pixel{i + 1}": pixels[:, i] for i in range(pixels.shape[1])})
    else:
        image = pa.FixedSizeBinaryArray.from_buffers(pa.binary(pixels.shape[1]), GROUP, [None, pa.py_buffer(pixels)])
        table = pa.table(columns | {"image": image})
    create = pacsv.CSVWriter if path.suffix == ".csv" else pq.ParquetWriter
    with create(path, table.schema) as writer:
        for start in range(0, rows, GROUP):
            writer.write_table(table.slice(0, min(GROUP, rows - start)))
    return path


@torch.inference_mode()
def time_bare(model: TrainedModel, images: torch.Tensor, batch: int) -> float:
    """Images a second."""
    network = model.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    started = time.perf_counter()
    for part in images.split(batch):
        network(model.preprocess(part)).softmax(dim=1)
    return len(images) / (time.perf_counter() - started)


def run_command(run: Path, table: Path) -> tuple[float, int]:
    """Seconds of the command, and the bytes that its processes held at most."""
    output = table.parent / "out.parquet"
    command = [sys.executable, "-m", "fmtune.cli", "predict", str(run), str(table), "-o", str(output)]
    started = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while running.poll() is None:
        peak = max(peak, sum(map(read_memory, find_processes(running.pid))))
        time.sleep(0.5)
    if running.returncode != 0:
        raise SystemExit(f"fmtune predict: exit code {running.returncode}")
    return time.perf_counter() - started, peak


def find_processes(root: int) -> list[int]:
    """A process and all below it."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field, the program's name in brackets, can hold spaces.
            parent = path.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        children[int(parent)].append(int(path.parent.name))
    found = [root]
    for process in found:
        found.extend(children[process])
    return found


def read_memory(process: int) -> int:
    """Proportional set size in bytes, 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = {"short": options.rows // 5, "long": options.rows}
    bare: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    memory: dict[str, list[int]] = {name: [] for name in sizes}
    with tempfile.TemporaryDirectory() as folder:
        run = fmtune.train({"trial": {"epochs": 1}}, data="sample", name="tiny", runs=folder).folder.path
        model = fmtune.load(run)
        images = read_named("sample", "train", Path(folder))[0].images
        held = torch.tensor(np.resize(images, (BARE_IMAGES, *images.shape[1:])))
        tables = {n: write_table(Path(folder) / f"{n}.{options.format}", images, rows) for n, rows in sizes.items()}
        for _ in range(options.rounds):
            for batch, rates in bare.items():
                rates.append(time_bare(model, held, batch))
            for name, table in tables.items():
                took, peak = run_command(run, table)
                seconds[name].append(took)
                memory[name].append(peak)
    print_results(sizes, bare, seconds, memory)


def print_results(
    sizes: dict[str, int],
    bare: dict[int, list[float]],
    seconds: dict[str, list[float]],
    memory: dict[str, list[int]],
) -> None:
    fastest = max(BATCHES, key=lambda batch: statistics.median(bare[batch]))
    rate = statistics.median(bare[fastest])
    pairs = list(zip(seconds["short"], seconds["long"], strict=True))
    long_run = [(sizes["long"] - sizes["short"]) / (long - short) for short, long in pairs]
    start = [short - sizes["short"] / in_it for (short, _), in_it in zip(pairs, long_run, strict=True)]
    print(f"bare model, {torch.get_num_threads()} threads, batches of {fastest}: {spread(bare[fastest])} images/s")
    for name, rows in sizes.items():
        peak = statistics.median(memory[name]) / 2**20
        whole = rows / statistics.median(seconds[name])
        print(f"{rows:>9,} rows: {spread(seconds[name])} s, {whole:,.0f} images/s in all, {peak:,.0f} MiB at most")
    print(f"in a long run: {spread(long_run)} images/s, {statistics.median(long_run) / rate:.2f} of the bare model")
    print(f"start and end: {spread(start)} s")


def spread(values: list[float]) -> str:
    median = statistics.median(values)
    digits = 1 if median < 1000 else 0
    return f"{median:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


if __name__ == "__main__":
    main()
