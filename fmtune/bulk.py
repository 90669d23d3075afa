"""Predictions by Ray Data: tasks read pieces, an actor on each CPU or GPU predicts their blocks, rows come in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayError, RayTaskError

from fmtune.classifier import TrainedModel
from fmtune.config import ResourcesConfig
from fmtune.errors import FmtuneError, InputError, RunFailed
from fmtune.pieces import BLOCK_BYTES, Piece, rows_of_block
from fmtune.rows import Predictor
from fmtune.session import interruptible, quiet, ray_session
from fmtune.view import print_plain

_PREDICTOR_CPUS, _READER_CPUS = 0.75, 0.25
"""Shares of a CPU, so that there is room for a reader beside each predictor: both would wait for each other else."""
_BLOCKS_AHEAD = 16
"""Blocks that may lie between readers and writer, for each predictor."""
_LONG_PIECE = 8
"""Blocks above which pieces are read one at a time: rows come in order, so those read beside it would pile up."""
_ROWS_WRITTEN = 2**14
"""Rows of a write, and so of a row group of Parquet."""


def predict_pieces(
    pieces: Sequence[Piece[pa.Table]],
    model: TrainedModel,
    address: str | None,
    write: Callable[[pa.Table], None],
    *,
    are_here: bool = False,
) -> None:
    """Predict pieces on a Ray cluster.

    Args:
        pieces: what is to be predicted.
        model: what predicts; it is sent to the predictors.
        address: of the cluster; a Ray of this machine's own by default.
        write: takes the rows that `Predictor` makes, in the order of the pieces.
        are_here: whether this process's node alone can be trusted to have the files.

    Raises:
        InputError: a piece can't be read.
        RunFailed: there is no Ray, or it lost a process and could not make up for it.
    """
    # Ray keeps its own log in its session folder.
    with (
        interruptible() as check,
        quiet() as screen,
        ray_session(ResourcesConfig(), address, partial(print_plain, screen.console)),
    ):
        tables = _create_dataset(pieces, model, are_here).iter_batches(batch_size=_ROWS_WRITTEN, batch_format="pyarrow")
        rows = 0
        with screen.console.status("predicting") as status:
            try:
                for table in tables:
                    check()
                    write(table)
                    rows += len(table)
                    status.update(f"{rows:,} rows predicted")
            except RayError as error:
                raise _explain(error) from error


def _create_dataset(pieces: Sequence[Piece[pa.Table]], model: TrainedModel, are_here: bool) -> ray.data.Dataset:
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    images = ray.data.read_datasource(
        _Pieces(pieces, are_here),
        # The head of a cluster is often given none to share out.
        num_cpus=0 if are_here else _READER_CPUS,
        concurrency=1 if max(piece.blocks for piece in pieces) > _LONG_PIECE else cpus,
        override_num_blocks=len(pieces),
    )
    rows: ray.data.Dataset = images.map_batches(
        Predictor,
        fn_constructor_args=(model,),
        # Ray Data wants a number where there are GPUs; without one a batch is a block as it was read.
        batch_size=rows_of_block(model.shape) if gpus else None,
        batch_format="pyarrow",
        num_cpus=_PREDICTOR_CPUS,
        num_gpus=1 if gpus else None,
        compute=ActorPoolStrategy(size=gpus or cpus),
    )
    rows.context.execution_options.preserve_order = True
    # By default blocks may fill the object store, and a long input would.
    ahead = _BLOCKS_AHEAD * (gpus or cpus) * BLOCK_BYTES
    rows.context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead)
    # Blocks go on as they are read: Ray Data joins them up to this size, and cuts them from half as much again on.
    rows.context.target_max_block_size = 3 * BLOCK_BYTES // 4
    rows.context.enable_progress_bars = False
    return rows


class _Pieces(Datasource):
    """A read task for each piece, on any node, or on this process's own."""

    def __init__(self, pieces: Sequence[Piece[pa.Table]], are_here: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pieces, self._are_here = pieces, are_here

    @property
    def supports_distributed_reads(self) -> bool:
        return not self._are_here

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: ray.data.DataContext | None = None,
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(piece.read, unknown) for piece in self._pieces]


def _explain(error: RayError) -> FmtuneError:
    """What Ray raised, as one of fmtune's errors."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, InputError):
        return error.cause
    return RunFailed(
        f"the prediction broke off, nothing is written: {str(error).strip().splitlines()[-1]}",
        "what its processes said is in Ray's session folder; free memory or CPUs, and start it again",
    )
