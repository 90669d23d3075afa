"""Configurations that go by a name."""

from __future__ import annotations

from fmtune.config import AugmentConfig, ModelConfig, OptimConfig, TrialConfig

SEED = TrialConfig(
    epochs=20,
    batch_size=256,
    drop_last=True,
    normalize=False,
    model=ModelConfig(depth=18, width=64, stem="imagenet", head="stack", channels=3),
    augment=AugmentConfig(flip=False, translate=0),
    optim=OptimConfig(name="adam", lr=1e-3, weight_decay=0.0, schedule="constant", label_smoothing=0.0),
)
"""The tutorial that fmtune grew out of, to the letter: what an untuned run gives."""
RECIPES = {"seed": SEED, "default": TrialConfig()}
"""What `baseline` takes as a name."""
