"""Text -> tokens -> Hessians of inputs, plain or weighted by the end loss, and of outputs."""

from qlr_jax.calibration.finite import Found
from qlr_jax.calibration.gradients import output_hessians, squared_gradients
from qlr_jax.calibration.hessians import hessians
from qlr_jax.calibration.imported import read_hessians
from qlr_jax.calibration.text import read_text, split_of, standard_library
from qlr_jax.calibration.tokens import calibration_tokens, encode, evenly, thinned
from qlr_jax.calibration.weighting import WEIGHTINGS, matrix_hessians, token_weights

__all__ = [
    "WEIGHTINGS",
    "Found",
    "calibration_tokens",
    "encode",
    "evenly",
    "hessians",
    "matrix_hessians",
    "output_hessians",
    "read_hessians",
    "read_text",
    "split_of",
    "squared_gradients",
    "standard_library",
    "thinned",
    "token_weights",
]
