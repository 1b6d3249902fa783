"""Text -> tokens -> Hessians, plain or weighted, and end-loss coefficients."""

from qlr_jax.calibration.gradients import output_gradients
from qlr_jax.calibration.hessians import hessians
from qlr_jax.calibration.text import read_text, split_of, standard_library
from qlr_jax.calibration.tokens import calibration_tokens, encode

__all__ = ["calibration_tokens", "encode", "hessians", "output_gradients", "read_text", "split_of", "standard_library"]
