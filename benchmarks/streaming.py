"""A source larger than memory: parsed, and streamed through an epoch, under a limit that holding it would break.

    python benchmarks/streaming.py [--rows 200000] [--limit 1G] [--memory 256M]

Writes a Parquet file of random images of 3 x 64 x 64 pixels, 12 KiB each, to a temporary folder. Each line is a process
of its own, in a control group of the limit but where it says so (Linux, as root): the source is read as `data.train`,
and its training rows pass once as batches of 256, without a step on them. What is seen is counted: each training row
must come once. At the end the default configuration trains on full Fashion-MNIST, held and streamed in turn: that shows
what a stream costs a training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from fmtune.batches import Batches, place_images
from fmtune.checkpoint import create_preprocess
from fmtune.config import DataConfig, TrialConfig, parse_size
from fmtune.data import TrainingData, cache_folder, load_training_data
from fmtune.datasets import read_named
from fmtune.model import create_model
from fmtune.training import EpochMetrics, TrainingState, fit

SIDE, CHANNELS, CLASSES = 64, 3, 10
GROUP = 2_000
"""Rows of a row group."""
BATCH = 256
ROUNDS = 3
EVERYTHING, SMALL = 2**50, 2**24
"""`data.memory` that holds all there is, and that streams Fashion-MNIST."""


def write_random(path: Path, rows: int) -> None:
    """Random images, and labels that go round."""
    random = np.random.default_rng(0)
    write_source(
        path,
        (
            (random.integers(0, 256, (GROUP, CHANNELS * SIDE * SIDE), dtype=np.uint8), np.arange(GROUP) % CLASSES)
            for _ in range(rows // GROUP)
        ),
    )


def write_fashion(path: Path) -> None:
    table, _ = read_named("fashion-mnist", "train", cache_folder())
    write_source(path, [(table.images.reshape(len(table), -1), table.labels)])


def write_source(path: Path, parts: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> None:
    """A Parquet file with a column of bytes an image (N, pixels)."""
    writer = None
    for pixels, labels in parts:
        kind = pa.binary(pixels.shape[1])
        images = pa.FixedSizeBinaryArray.from_buffers(kind, len(pixels), [None, pa.py_buffer(pixels)])
        table = pa.table({"label": labels, "image": images})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def pass_once(source: str, memory: int) -> dict[str, float]:
    """Load the source and see each of its training rows once."""
    started = time.perf_counter()
    data = load_training_data(DataConfig(train=source, shape=(SIDE, SIDE, CHANNELS), memory=memory))
    loaded = time.perf_counter()
    batches = create_batches(data)
    seen = torch.zeros(CLASSES, dtype=torch.int64)
    for images, labels, _ in batches.shuffled(BATCH, False, torch.Generator().manual_seed(0)):
        assert images.shape[1:] == (CHANNELS, SIDE, SIDE)
        seen += labels.bincount(minlength=CLASSES)
    if not torch.equal(seen, batches.labels[batches.rows].bincount(minlength=CLASSES)):
        raise SystemExit("a row came twice, or not at all")
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"load": loaded - started, "rate": len(batches) / (ended - loaded), "peak": peak}


def train(source: str, memory: int) -> dict[str, float]:
    """Images/s of the default configuration from the second epoch on."""
    data = load_training_data(DataConfig(train=source, memory=memory))
    config = TrialConfig(epochs=3)
    torch.manual_seed(0)
    network = create_model(config.model, 1, CLASSES).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rates: list[float] = []

    def report(metrics: EpochMetrics, _: TrainingState) -> None:
        rates.append(metrics.images_per_second)

    fit(network, create_preprocess(config, data.pixels), create_batches(data), None, config, seed=0, report=report)
    return {"rate": statistics.fmean(rates[1:])}


def create_batches(data: TrainingData) -> Batches:
    images = place_images(data.images, torch.device("cpu"))
    return Batches(images, torch.tensor(data.labels), torch.tensor(data.train_rows))


@contextmanager
def limited(limit: int | None) -> Iterator[Path | None]:
    """A control group of so many bytes of memory, as the file that a process writes its number to; None without one."""
    if limit is None:
        yield None
        return
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, name = (first, "memory.limit_in_bytes") if first.is_dir() else (second, "memory.max")
    group = root / f"fmtune-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(limit))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def run(role: str, source: Path, memory: int, limit: int | None = None) -> dict[str, float] | None:
    """What a process found, None where it was ended because its memory did not suffice."""
    command = [sys.executable, __file__, "--role", role, "--source", source, "--memory", str(memory)]
    environment = os.environ | {"FMTUNE_CACHE": str(source.with_name(f"cache-{memory}"))}
    with limited(limit) as group:

        def join() -> None:
            if group is not None:
                group.write_text(str(os.getpid()))

        done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=join, check=False)
    if done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _parse_bytes(text: str) -> int:
    return int(text) if text.isdecimal() else int(str(parse_size(text)))


def describe(found: dict[str, float] | None) -> str:
    if found is None:
        return "ended for want of memory"
    return f"loaded in {found['load']:.1f} s, {found['rate']:,.0f} images/s, {found['peak'] / 2**20:,.0f} MiB at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--limit", type=_parse_bytes, default=2**30)
    parser.add_argument("--memory", type=_parse_bytes, default=2**28)
    parser.add_argument("--role", choices=["pass", "train"], help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        role = pass_once if options.role == "pass" else train
        print(json.dumps(role(options.source, options.memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        images, fashion = Path(folder, "images.parquet"), Path(folder, "fashion.parquet")
        write_random(images, options.rows)
        write_fashion(fashion)
        mebibytes = images.stat().st_size / 2**20
        print(f"{options.rows:,} images, {mebibytes:,.0f} MiB; a limit of {options.limit / 2**20:,.0f} MiB")
        streamed = f"streamed in {options.memory / 2**20:,.0f} MiB"
        for title, memory, limit in (
            ("held, under the limit", EVERYTHING, options.limit),
            (f"{streamed}, under the limit", options.memory, options.limit),
            (f"{streamed}, parsed before, under the limit", options.memory, options.limit),
            ("held, without a limit", EVERYTHING, None),
            ("held, parsed before, without a limit", EVERYTHING, None),
        ):
            print(f"{title}: {describe(run('pass', images, memory, limit))}", flush=True)
        rates: dict[int, list[float]] = {EVERYTHING: [], SMALL: []}
        for _ in range(ROUNDS):
            for memory, found in rates.items():
                trained = run("train", fashion, memory)
                assert trained is not None
                found.append(trained["rate"])
        held, small = (statistics.median(found) for found in rates.values())
        print(f"training on Fashion-MNIST held: {held:,.0f} images/s ({min(rates[EVERYTHING]):,.0f} to ", end="")
        print(f"{max(rates[EVERYTHING]):,.0f}); streamed in {SMALL / 2**20:.0f} MiB: {small:,.0f} ", end="")
        print(f"({min(rates[SMALL]):,.0f} to {max(rates[SMALL]):,.0f}), {small / held:.2f} of it")


if __name__ == "__main__":
    main()
