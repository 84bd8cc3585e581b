"""Every method of pre-training side by side, then label distillation; alone, or as one of two processes by torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch

from mimlet import api
from mimlet.config import Config, load_config

DECODER = {"dim": 12, "heads": 3}
ADAPTIVE = {"kind": "relations", "heads": "adaptive", "label": "heads"}
PRETRAIN: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", "decoder": DECODER},
    "dmae": {"name": "dmae", "decoder": DECODER},
    "d2mae_heads": {"name": "dmae", "decoder": DECODER, "decode_layer": 1, "attention_layers": [], "terms": [ADAPTIVE]},
    "tinymim": {"name": "tinymim"},
    "average": {"name": "tinymim", "relations": {"heads": "average", "pairs": ["qk", "vv", "kk"]}},
    "learned_map": {"name": "tinymim", "relations": {"heads": "learned_map"}},
    "mimhd": {"name": "mimhd", "dual_view": {"target": "normalised"}},
    "mimhd_mixture": {"name": "mimhd", "relations": {"heads": "adaptive", "adaptive": {"reading": "mixture"}}},
    "g2sd": {"name": "g2sd", "decoder": DECODER},
    "dmae_features": {"name": "dmae_features", "decoder": DECODER},
    "simmim": {"name": "simmim", "mask_px": 8},
    "maskfeat": {"name": "maskfeat", "masking": {"smallest": 0.06, "tries": 1}},
    "maskfeat_teacher": {"name": "maskfeat", "target": "teacher"},
    "bootmae": {"name": "bootmae", "decoder": DECODER, "momentum": (0.5, 0.7, 0.9)},
    "beit": {"name": "beit", "masking": {"smallest": 0.06, "tries": 1}},
    "dino": {"name": "dino", "local_size": 8, "local_crops": 2, "outputs": 20, "hidden": 16, "momentum": (0.5, 1.0)},
    "mocov3": {"name": "mocov3", "hidden": 20, "outputs": 8, "momentum": 0.5},
    "mae_hiera": {"name": "mae", "decoder": {"dim": 16, "heads": 2, "position": "learned"}},
    "mae_itpn": {"name": "mae", "decoder": {"dim": 16, "heads": 2}},
    "itpn": {"name": "itpn", "decoder": {"dim": 16, "heads": 2}, "features": {"momentum": 0.5}},
    "itpn_clip": {"name": "itpn_clip", "masking": {"smallest": 0.06, "tries": 1}},
}
WHOLE = {"mocov3": PRETRAIN["mocov3"]}
"""Methods that contrast the images of a step, and take no pieces."""
OWN_VIEWS = ("dino", "mocov3")
DIVIDED = ("mimhd", "bootmae", "itpn_clip", "dino", "mocov3")
"""Methods also trained with gradients and memory divided: they scale or clip gradients, have followers, or normalise
over processes.
"""
FINETUNE: dict[str, dict[str, Any]] = {
    "classify": {"name": "classify"},
    "class_token": {"name": "classify", "distill": {"kind": "soft"}},
    "distillation_token": {
        "name": "classify",
        "pool": "class",
        "distill": {"kind": "hard", "token": "distillation"},
    },
    "classify_hiera": {"name": "classify"},
    "classify_itpn": {"name": "classify"},
}
PLAIN = {"name": "vit_nano", "image_size": 16, "dim": 24, "depth": 2, "heads": 3}
HIERA = {"name": "hiera_micro", "image_size": 16, "dim": 4}
ITPN = {"name": "itpn_micro", "image_size": 16, "dim": 16, "heads": 2, "pyramid_dim": 8, "stages": (1, 1, 2)}
ENCODERS: dict[str, dict[str, Any]] = {
    "mae_hiera": HIERA,
    "classify_hiera": {**HIERA, "q_pool": 3},
    **dict.fromkeys(("mae_itpn", "itpn", "itpn_clip", "classify_itpn"), ITPN),
}
"""Those that are not plain."""


def config(
    name: str, method: dict[str, Any], teacher: Path, data: Path, out: Path, pieces: int, strategy: str = "auto"
) -> Config:
    """Four steps of 8 images, by plain gradient descent: rounding must not grow. Encoders are judged meanwhile."""
    labelled = [] if method in FINETUNE.values() else [str(data)]
    if method["name"] == "beit":
        method = {**method, "tokenizer": str(teacher.parent / "tokenizer")}
    augment = {} if method["name"] in OWN_VIEWS else {"color_jitter": 0.4}
    clip = 1.0 if method["name"] == "mocov3" else 0.0  # the gradients of its class token are in the hundreds at first
    return load_config(
        {
            "encoder": ENCODERS.get(name, PLAIN),
            "method": method,
            "teacher": {"path": str(teacher), "precision": "32"},
            "data": {"path": [str(data)], "labelled": labelled, "augment": augment},
            "optim": {"name": "sgd", "lr": 0.05, "lr_batch": 0, "weight_decay": 0, "clip": clip},
            "schedule": {"batch": 8, "steps": 4},
            "speed": {
                "accelerator": "cpu",
                "precision": "32",
                "workers": 0,
                "accumulate": pieces,
                "strategy": strategy,
            },
            "run": {"out": str(out / name), "tensorboard": False, "report": False, "log_steps": 1},
        }
    )


def main(data: Path, teachers: Path, out: Path, pieces: int) -> None:
    """Trains all methods into folders below `out`; each batch in as many pieces per process."""
    divisible = {name: method for name, method in PRETRAIN.items() if name not in WHOLE}
    for methods, teacher in ((divisible, "encoder"), (FINETUNE, "labels")):
        api.compare([config(name, method, teachers / teacher, data, out, pieces) for name, method in methods.items()])
    for name, method in WHOLE.items():
        api.train(config(name, method, teachers / "encoder", data, out, pieces=1))


def divided(data: Path, teachers: Path, out: Path) -> None:
    """Trains some of them with everything divided."""
    api.compare([config(name, PRETRAIN[name], teachers / "encoder", data, out, 1, "fsdp") for name in DIVIDED])


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, teachers, out = map(Path, sys.argv[1:])
    main(data, teachers, out, pieces=1)
    divided(data, teachers, out / "divided")
