"""What `tests.support.workers.spawn` imports once for all of its processes."""

from train.gan import loop as gan_loop
from train.gpt import loop as gpt_loop

__all__ = ["gan_loop", "gpt_loop"]
