"""FSDP2: the target is built and sharded exactly as the model; each rank averages its own shards.

torchrun --nproc-per-node 2 fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fused_ema import FusedEMA


def sharded_network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)  # the same start for both
    network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to(device)
    for layer in network:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(network)
    return network


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    model, target = sharded_network(device), sharded_network(device).requires_grad_(False)
    ema = FusedEMA(model, target=target, decay=0.99)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        x = torch.randn(64, 32, device=device)
        with torch.no_grad():
            goal = target(x)
        (model(x) - goal - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    distances = ema.distances()  # the one all-reduce: on every rank
    if dist.get_rank() == 0:
        print({name: round(distance, 4) for name, distance in distances.items()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
