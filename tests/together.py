"""Several processes in a test, cheaply: forked from a server that has imported the package once."""

import multiprocessing
import os
import socket
import traceback
from queue import Empty

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jepa_fast.train"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(size, job, *args, timeout=240, statuses=False):
    """[job(rank, *args) of every rank], in one process each, set up as torchrun would. A failure is this test's failure.

    statuses: return how the processes ended instead; they may end in any way.
    """
    results, port, folder = CONTEXT.Queue(), free_port(), os.getcwd()
    processes = [
        CONTEXT.Process(target=_work, args=(rank, size, port, folder, results, job, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    returned = {}
    if statuses:
        for process in processes:
            process.join(timeout)
            process.kill()
        return [process.exitcode for process in processes]
    try:
        while len(returned) < size:
            rank, value, trouble = results.get(timeout=timeout)
            assert not trouble, f"rank {rank}:\n{trouble}"
            returned[rank] = value
    except Empty:
        raise AssertionError(f"only ranks {sorted(returned)} of {size} came back in {timeout} s") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [returned[rank] for rank in range(size)]


def _work(rank, size, port, folder, results, job, args):
    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    try:
        results.put((rank, job(rank, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
