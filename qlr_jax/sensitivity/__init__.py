"""Model and statistics -> what every option of every matrix costs and damages."""

from qlr_jax.sensitivity.anchors import PROBE, solved_first
from qlr_jax.sensitivity.attribution import ATTRIBUTIONS, Attribution, Case, attribute
from qlr_jax.sensitivity.correction import Correction, CorrectionKey, correction_key
from qlr_jax.sensitivity.given_backbones import measure_given
from qlr_jax.sensitivity.knockout import knockout
from qlr_jax.sensitivity.measure import Sensitivity, measure, prediction_quality
from qlr_jax.sensitivity.offers import facts, options, price, vocabulary_options
from qlr_jax.sensitivity.path import path_shares
from qlr_jax.sensitivity.predict import Profile, grid_error, predict, profile
from qlr_jax.sensitivity.second_order import second_order
from qlr_jax.sensitivity.statistics import Statistics, final_error

__all__ = [
    "ATTRIBUTIONS",
    "PROBE",
    "Attribution",
    "Case",
    "Correction",
    "CorrectionKey",
    "Profile",
    "Sensitivity",
    "Statistics",
    "attribute",
    "correction_key",
    "facts",
    "final_error",
    "grid_error",
    "knockout",
    "measure",
    "measure_given",
    "options",
    "path_shares",
    "predict",
    "prediction_quality",
    "price",
    "profile",
    "second_order",
    "solved_first",
    "vocabulary_options",
]

side_of = correction_key  # another name of the same, for callers outside of this library
