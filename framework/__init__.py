"""Sapwood: multi-GPU fine-tuning and RLHF for language models that does not make them forget.

Importing this package is cheap on purpose: it imports no torch. Take what you need from the rooms
(`framework.losses`, `framework.strategy`, `framework.data`, ...); ARCHITECTURE.md draws them.
"""

__version__ = "0.1.0"
