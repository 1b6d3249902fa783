"""Registers qlr folders with transformers, without JAX: after this import a plain `from_pretrained` loads them packed.

    import qlr_jax.formats.qlr.torch_runtime
    model = AutoModelForCausalLM.from_pretrained(folder)

The folder's own copy does the same through `trust_remote_code=True`, with nothing of qlr-jax installed.
"""

import torch

from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr.modeling_qlr import QLRConfig, QLRForCausalLM, QLRLinear, QLRQuantizer, register

register()

__all__ = ["QLRConfig", "QLRForCausalLM", "QLRLinear", "QLRQuantizer", "register", "use_kernels"]


def use_kernels(model: torch.nn.Module) -> int:
    """Let the packed layers of a loaded model use Triton kernels for at most 8 tokens at a time, as in decoding.

        y = g · Uᵀ (Q + L diag(s) R) V x        x (…, in), y (…, out)

    Experimental: the kernels were checked in Triton's interpreter only and never ran on a GPU, so their speed is not known.
    More tokens, gradients, torch.compile, and quantizers without a kernel (nf, e8, and groups of integers that a word of codes
    does not divide) are served by the layers' own forward, as before. Call it after loading and moving the model: a model that is
    moved afterwards falls back to its own forward, and changed signs are not seen, until it is called again.

    Args:
        model: with QLRLinear layers, from `from_pretrained`, on a GPU; or on a processor with TRITON_INTERPRET=1 set before
            Triton is imported, which is slow and serves tests.

    Returns:
        How many layers have kernels now.

    Raises:
        QLRError: where Triton is missing, the model has no packed layer, or one lies neither on a GPU nor is interpreted.

    Example:
        >>> use_kernels(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
            ...
        qlr_jax.errors.QLRError: this model has no packed layers
    """
    try:
        import triton
    except ImportError:
        raise QLRError("use_kernels needs Triton, which is not installed; pip install triton, or go on without kernels") from None
    from qlr_jax.formats.qlr.kernels import replace_forward

    linears = {name: module for name, module in model.named_modules() if type(module).__name__ == "QLRLinear"}
    if not linears:
        raise QLRError("this model has no packed layers, so kernels have nothing to do; load a qlr folder without dequantize")
    for name, linear in linears.items():
        device = next(linear.buffers()).device.type
        interpreted = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]  triton sets it as it is imported
        if device != "cuda" and not (device == "cpu" and interpreted):
            raise QLRError(
                f"{name} lies on {device}, but kernels need a GPU; move the model there first (to try them on a processor, set "
                "TRITON_INTERPRET=1 before Python starts)"
            )
    found = 0
    for linear in linears.values():
        try:
            replace_forward(linear)
            found += 1
        except NotImplementedError:  # it goes on as before
            pass
    return found
