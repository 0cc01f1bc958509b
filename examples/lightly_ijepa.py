"""CollapseMonitor in lightly's I-JEPA: its backbone, predictor, mask collator and transform, on a folder of images.

python examples/lightly_ijepa.py [--data FOLDER] [--steps N] [--out FOLDER]

Follows lightly's own example (examples/pytorch/ijepa.py); what is new is marked 1, 2, 3. Without --data: noise of two kinds,
which shows that it runs and nothing else.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightly.data import IJEPAMaskCollator
from lightly.models import utils
from lightly.models.modules.ijepa import IJEPABackbone, IJEPAPredictor
from lightly.transforms.ijepa_transform import IJEPATransform
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VisionTransformer

from jepa_fast.monitor import CollapseMonitor


class Images(Dataset):
    """(transformed image, 0): the files of a folder, or noise."""

    def __init__(self, folder: str, size: int):
        self.files = (
            [f for f in sorted(Path(folder).rglob("*")) if f.suffix.lower() in (".jpg", ".jpeg", ".png")]
            if folder
            else []
        )
        self.transform = IJEPATransform(input_size=size)
        self.noise = None if folder else np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.files) if self.noise is None else len(self.noise)

    def __getitem__(self, index: int):
        image = (
            Image.open(self.files[index]).convert("RGB") if self.noise is None else Image.fromarray(self.noise[index])
        )
        return self.transform(image), 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", default="runs/lightly")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=10)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    shape = {
        "num_layers": options.depth,
        "num_heads": 12,
        "hidden_dim": 768,
        "mlp_dim": 3072,
    }  # ViT-B, as in their example
    encoder = IJEPABackbone.from_vit(VisionTransformer(options.size, options.patch, **shape))
    for_predictor = VisionTransformer(options.size, options.patch, **shape)
    predictor = IJEPAPredictor.from_vit_encoder(for_predictor.encoder, (options.size // options.patch) ** 2)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    collate = IJEPAMaskCollator(input_size=(options.size, options.size), patch_size=options.patch)
    loader = DataLoader(
        Images(options.data, options.size), options.batch_size, True, collate_fn=collate, drop_last=True
    )
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=1.5e-4)

    monitor = CollapseMonitor(options.out, (encoder, target_encoder), loss="smooth_l1", target_norm="layer")  # 1
    step = 0
    while step < options.steps:
        for (images, _), masks_enc, masks_pred in loader:
            with torch.no_grad():
                full = target_encoder(images)  # [B, N + 1, D]: lightly's backbone keeps a class token
                target = utils.apply_masks(F.layer_norm(full, (full.size(-1),)), masks_pred)
                target = utils.repeat_interleave_batch(target, len(images), repeat=len(masks_enc))
            context = encoder(images, masks_enc)  # [B, K, D], the masks' own numbering of tokens
            loss = F.smooth_l1_loss(predictor(context, masks_enc, masks_pred), target)

            monitor.observe(loss, context=context, target=full, visible=masks_enc, hidden=masks_pred)  # 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                momentum = 0.996 + step * (1.0 - 0.996) / options.steps
                for theta, theta_bar in zip(encoder.parameters(), target_encoder.parameters(), strict=True):
                    theta_bar.lerp_(theta, 1 - momentum)
            step += 1
            if step == options.steps:
                break
    monitor.close()  # 3
    print(f"python -m jepa_fast.report {options.out}")


if __name__ == "__main__":
    main()
