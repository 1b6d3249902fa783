"""Text -> tokens -> Hessians of inputs, plain or weighted by the end loss, and of outputs."""

from qlr_jax.calibration.backward import States, forward_states
from qlr_jax.calibration.compensated import compensated_target, moments
from qlr_jax.calibration.corpus import Corpus, Files
from qlr_jax.calibration.descent import EndSums
from qlr_jax.calibration.finite import CalibrationResult
from qlr_jax.calibration.gradients import output_hessians, squared_gradients
from qlr_jax.calibration.hessians import hessians
from qlr_jax.calibration.imported import read_hessians
from qlr_jax.calibration.text import read_text, split_of, standard_library
from qlr_jax.calibration.tokens import (
    SHORTEST,
    calibration_tokens,
    encode,
    evenly_spaced,
    fitting_length,
    shares,
    spread,
    subsample,
)
from qlr_jax.calibration.vocabulary import RowMetric, row_metrics, vocabulary_metrics
from qlr_jax.calibration.weighting import WEIGHTINGS, matrix_hessians, token_weights

__all__ = [
    "SHORTEST",
    "WEIGHTINGS",
    "CalibrationResult",
    "Corpus",
    "EndSums",
    "Files",
    "RowMetric",
    "States",
    "calibration_tokens",
    "compensated_target",
    "encode",
    "evenly_spaced",
    "fitting_length",
    "forward_states",
    "hessians",
    "matrix_hessians",
    "moments",
    "output_hessians",
    "read_hessians",
    "read_text",
    "row_metrics",
    "shares",
    "split_of",
    "spread",
    "squared_gradients",
    "standard_library",
    "subsample",
    "token_weights",
    "vocabulary_metrics",
]

# Other names of the same, for callers outside of this library.
Found, evenly, thinned = CalibrationResult, evenly_spaced, subsample
