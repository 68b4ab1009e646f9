"""Hugging Face's Trainer, and what derives from it, under a plan: `with_tithe`."""

from tithe.integrations.transformers.trainer import with_tithe

__all__ = ["with_tithe"]
