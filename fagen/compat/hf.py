"""Hugging Face transformers: `fagen.hf.register()`, then `attn_implementation="fagen"`."""

from __future__ import annotations

import inspect

from fagen.errors import MissingTool

NAME = "fagen"
_READ = {"q_length", "q_offset", "kv_offset", "local_size", "use_vmap", "device"}  # of what a mask is asked with


def register() -> None:
    """Make `attn_implementation="fagen"` known to transformers: the attention and the masks that it is given.

    Causal, sliding, padded and packed masks, and any other whose keys are each seen by one run of rows, become
    arguments of `fagen.attention`. A mask of another form and a bias are computed by PyTorch, with a warning.
    """
    try:
        import transformers
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise MissingTool(
            "transformers cannot be imported", str(error), "run: pip install 'transformers>=5'"
        ) from error
    if not inspect.signature(sdpa_mask).parameters.keys() >= _READ:
        raise MissingTool(
            f"transformers {transformers.__version__} asks for masks in another way", "", "install a newer 5.x"
        )
    from fagen.compat.hf_attention import attend
    from fagen.compat.hf_masks import make_mask

    transformers.AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
