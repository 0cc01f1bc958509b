"""This process among all: joining, leaving, and agreeing on values."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_fast import cores
from jepa_fast.config import Config
from jepa_fast.errors import UsageError
from jepa_fast.model.targets import FROM_BATCH


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # processes on this machine
    host: dist.ProcessGroup | None = None  # on CPU, apart from the collectives of training
    files: dist.ProcessGroup | None = None  # likewise, for what is written in the background

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(config: Config) -> World:
    """Enter the process group that torchrun described (NCCL on CUDA, gloo on CPU), or be alone.

    A mode other than `single` has a group even of one process. Raises UsageError if the batch cannot be shared out, if
    `single` is asked of several processes, if NCCL is missing, or if the processes cannot find one another.
    """
    size, rank, local = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    check_split(config, size)
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UsageError(
            f"{local_size} processes on a machine with {torch.cuda.device_count()} GPU(s): start one for each"
        )
    if cuda:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    torch.set_num_threads(config.parallel.threads or cores.threads(local_size))
    if config.train.deterministic:
        _be_deterministic()
    if size == 1 and config.parallel.mode in ("auto", "single"):
        return World(rank, size, device)
    if cuda and not dist.is_nccl_available():
        raise UsageError("this torch has no NCCL, which several GPUs need: install a CUDA build of torch for Linux")
    _enter("cpu:gloo,cuda:nccl" if cuda else "gloo", rank, size, config.parallel.start_timeout)
    wait = timedelta(seconds=config.parallel.start_timeout)
    host, files = (dist.new_group(backend="gloo", timeout=wait) for _ in range(2))
    return World(rank, size, device, local_size, host, files)


def check_split(config: Config, size: int) -> None:
    """Raises UsageError if the batch or the mode does not go with `size` processes."""
    batch, mode, shards = config.train.batch_size, config.parallel.mode, config.parallel.shards
    if batch % size:
        near = [n for n in (batch // size * size, -(-batch // size) * size) if n]
        raise UsageError(
            f"--train.batch_size {batch} is the global batch: {size} processes do not divide it; "
            f"give {' or '.join(map(str, near))}"
        )
    micro, norm = config.parallel.micro_batch, config.objective.target_norm
    if 0 < micro < batch // size and norm in FROM_BATCH and config.objective.target_stats == "batch":
        raise UsageError(
            f"--parallel.micro_batch {micro}: targets of --objective.target_norm {norm} need the whole batch at once; "
            "give --objective.target_stats running, or --parallel.micro_batch 0"
        )
    if 0 < micro < batch // size and config.regularizer.kind != "none":
        raise UsageError(
            f"--parallel.micro_batch {micro}: --regularizer.kind {config.regularizer.kind} needs the whole batch at once; "
            "give --parallel.micro_batch 0"
        )
    if mode == "single" and size > 1:
        raise UsageError(f"--parallel.mode single, but {size} processes were started; use auto, ddp, fsdp or hsdp")
    if mode == "hsdp" and shards and size % shards:
        raise UsageError(
            f"--parallel.shards {shards}: copies of the model must be whole, and {size} processes are not so many times {shards}"
        )


def _enter(backend: str, rank: int, size: int, seconds: float) -> None:
    timeout = timedelta(seconds=seconds)
    if size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {size} but MASTER_ADDR is not set: start with torchrun --nproc_per_node={size} -m jepa_fast.train ..."
        )
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        # torchrun keeps its store over restarts, and with it the addresses of processes that are gone.
        attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '?')}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise UsageError(
                f"port {where} is in use, perhaps by another run: torchrun --standalone takes a free one, or give another --master_port"
            ) from None
        raise UsageError(f"rank {rank} found no company of {size} at {where}: {reason}") from None


def here() -> World:
    """This process in a group that somebody else made; alone if there is none. The device is not looked into."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return World(rank, size, torch.device("cpu"))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shorten_timeouts(config: Config) -> None:
    """After the first step nobody opens data or compiles any more: a silence of `parallel.timeout` is a hang."""
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.parallel.timeout), group)


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch names the operation that has no such variant
    torch.backends.cudnn.benchmark = False


# ---- agreeing -------------------------------------------------------------------------------------


def average(values: dict[str, Tensor], world: World) -> dict[str, float]:
    """Scalars on the device -> means over processes on the host: one collective, one synchronisation."""
    if not values:
        return {}
    stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    if world.size > 1:
        dist.all_reduce(stacked)
        stacked /= world.size
    return dict(zip(values, stacked.tolist(), strict=True))


def mean(value: Tensor, world: World) -> Tensor:
    """The mean over processes of a tensor on the device, without a synchronisation with the host."""
    if world.size == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world.size


def same_everywhere(value: Any, world: World) -> Any:
    """Rank 0's value, on every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.host)
    return box[0]


def gather(value: Any, world: World) -> list[Any]:
    """Every process's value, in the order of ranks, on every process."""
    if world.size == 1:
        return [value]
    box: list[Any] = [None] * world.size
    dist.all_gather_object(box, value, group=world.host)
    return box


@contextmanager
def lead(world: World) -> Iterator[None]:
    """What may be refused by some process is refused by all, with the same words: nobody is left waiting.

    Work inside must not communicate.
    """
    trouble: UsageError | None = None
    try:
        yield
    except UsageError as error:
        trouble = error
    said = [text for text in gather(str(trouble) if trouble else "", world) if text]
    if said:
        raise refusal(said[0], world)


def refusal(text: str, world: World) -> UsageError | SystemExit:
    """To raise on all processes: the main one says it for all, the others only end."""
    return UsageError(text) if world.is_main else SystemExit(2)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier(world.host)
