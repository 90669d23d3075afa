"""CSV to a Ray Dataset beside a bare `pyarrow.csv.read_csv`, and the same from the Parquet cache.

    python benchmarks/data.py [--rounds 5]

Writes Fashion-MNIST's training part (60,000 x 785) as a CSV to a temporary folder, then times in turn, in one process,
the bare read with uint8 columns, fmtune's way from the CSV to a Ray Dataset with the cache written, and fmtune's way
from the cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import ray.data

from fmtune.config import DataConfig, ResourcesConfig
from fmtune.data import load_split, to_arrow
from fmtune.session import ray_session


def read_bare(path: Path) -> None:
    """All columns as numbers of the right size, and nothing else."""
    names = ["label", *(f"pixel{i + 1}" for i in range(784))]
    types = dict.fromkeys(names, pa.uint8())
    pacsv.read_csv(path, convert_options=pacsv.ConvertOptions(column_types=types))


def read_as_dataset(path: Path) -> None:
    """fmtune's way."""
    table = load_split(DataConfig(train=str(path)), "train").table
    rows = ray.data.from_arrow(to_arrow(table.images, table.labels)).count()
    assert rows == 60_000


def timed(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder, ray_session(ResourcesConfig(), None):
        os.environ["FMTUNE_CACHE"] = f"{folder}/cache"
        path = Path(folder) / "train.csv"
        table = load_split(DataConfig(train="fashion-mnist"), "train").table
        pixels = table.images.reshape(len(table), -1)
        columns = {"label": table.labels} | {f"pixel{i + 1}": pixels[:, i] for i in range(784)}
        pacsv.write_csv(pa.table(columns), path)
        read_as_dataset(path)
        seconds: dict[str, list[float]] = {"bare read_csv": [], "CSV to Ray Dataset": [], "cache to Ray Dataset": []}
        for _ in range(rounds):
            os.utime(path)  # another time of change is another table, so the cache has nothing
            seconds["bare read_csv"].append(timed(lambda: read_bare(path)))
            seconds["CSV to Ray Dataset"].append(timed(lambda: read_as_dataset(path)))
            seconds["cache to Ray Dataset"].append(timed(lambda: read_as_dataset(path)))
    bare = statistics.median(seconds["bare read_csv"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<22}{median:.3f} s  ({min(values):.3f} to {max(values):.3f})  {median / bare:.2f} of bare")


if __name__ == "__main__":
    main()
