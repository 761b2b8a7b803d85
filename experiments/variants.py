"""What the variants of the recipes differ in: settings for ``iared2 train --set``, by size where it matters."""

from __future__ import annotations

CLASSES = "goldfish", "monarch", "school bus", "espresso", "ladybug", "king penguin", "orange", "lion", "barn", "teddy"
CLUTTER = {
    "tiny_imagenet": ["data.clutter=128", "model.timm={ img_size = 128, patch_size = 8 }"],
    "tiny_imagenet_cpu": [  # what two CPU cores can do: ten classes, 144 patches
        "data.clutter=96",
        "model.timm={ img_size = 96, patch_size = 8 }",
        f"data.classes={list(CLASSES)}",
        "policy_gradient.epochs=4",
        "policy_gradient.augment={ min_scale = 0.8, color_jitter = 0.0 }",
        "finetune.epochs=2",
        "finetune.augment={ min_scale = 0.6, color_jitter = 0.2 }",
    ],
}
CLUTTER_BACKBONE = {
    "tiny_imagenet": ["model.checkpoint=''"],  # from scratch: its patches are larger than the reference model's
    "tiny_imagenet_cpu": [  # from the weights of the whole photos
        "backbone.epochs=18",
        "backbone.lr=1e-3",
        "backbone.warmup_epochs=0.2",
        "backbone.patch_drop=0.75",
        "backbone.mixup=0.0",
        "backbone.cutmix=0.0",
        "backbone.ema_decay=0.99",
        "backbone.augment={ min_scale = 0.6, color_jitter = 0.2 }",
        "policy_gradient.epochs=0",
        "finetune.epochs=0",
    ],
}
CLUTTER_OURS = ["policy.keep=[1.0, 0.2, 0.12, 0.08]"]
MERGED = ["model.dropped='merged'", "policy.equal_counts=true"]
GENTLE = [1.0, 0.7, 0.5, 0.4]  # at 65 % of the MACs
SIGMOID = [  # the paper's interpreter, from noise, and what suits it
    "model.interpreter='sigmoid'",
    "policy.temperature=0.2",
    "policy_gradient.lr=2e-3",
]
SHORT = {  # six runs
    "tiny_imagenet": ["policy_gradient.epochs=0.25", "finetune.epochs=0.15"],
    "tiny_imagenet_cpu": ["policy_gradient.epochs=0.25", "finetune.epochs=0.15"],  # a third of the fine-tuning
    "reference": ["policy_gradient.epochs=0.016", "policy_gradient.batch_size=16", "finetune.epochs=0"],  # none of it
}
