"""Triton kernels for one to eight tokens: y = g · Uᵀ (Q + L diag(s) R) V x, straight from the packed codes.

    from qlr_jax.formats.qlr.torch_runtime import use_kernels
    use_kernels(model)

These kernels never ran on a GPU. They were checked against `QLRLinear.forward` in Triton's interpreter, on a processor, and
compiled for compute capability 9.0; how fast they are is not known, so nothing uses them unless `use_kernels` is called.

A layer takes five launches, or two where nothing is rotated; all work in float32, whatever the type of x and y.

    apply_factor    twice: v = V x, by the two factors of a Hadamard-like matrix; the signs are applied along with them
    products        a program takes a band of rows of Q and a share of the columns, and more programs take R; each decodes its
                    codes in registers, once for all tokens, and leaves partial sums, so that the order of additions never changes
    finish          adds those sums, adds L diag(s) R v, multiplies by g and applies the first half of Uᵀ
    apply_factor    the other half, with signs and bias

Shapes alone decide what is allocated and launched, and nothing is read back, so CUDA graphs can record it.

    language     Triton's language, and the types by which it is checked        decode      codes -> weights, in registers
    products     Q v and R v as partial sums                                    combine     sums, L, g, rotations, bias
    plan         how a part is stored, and how its sums are shared out          launch      one layer: Kernel, replace_forward
"""

from qlr_jax.formats.qlr.kernels.launch import MOST_TOKENS, Kernel, replace_forward

__all__ = ["MOST_TOKENS", "Kernel", "replace_forward"]
