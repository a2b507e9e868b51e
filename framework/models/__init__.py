"""What importing transformers, here and elsewhere, must not say."""

import logging

# transformers imports torchao wherever it is installed, which warns of its kernels for other devices and of
# enumerations that it registers with torch: in every command, before its first word
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
