"""Model and statistics -> what every option of every matrix costs and damages."""

from qlr_jax.sensitivity.attribution import ATTRIBUTIONS, Attribution, Case, attribute
from qlr_jax.sensitivity.given import measure_given
from qlr_jax.sensitivity.knockout import knockout
from qlr_jax.sensitivity.path import path_shares
from qlr_jax.sensitivity.predict import Correction, Profile, grid_error, predict, profile, side_of
from qlr_jax.sensitivity.second_order import second_order
from qlr_jax.sensitivity.table import (
    PROBE,
    Sensitivity,
    Statistics,
    facts,
    final_error,
    measure,
    options,
    prediction_quality,
    price,
)

__all__ = [
    "ATTRIBUTIONS",
    "PROBE",
    "Attribution",
    "Case",
    "Correction",
    "Profile",
    "Sensitivity",
    "Statistics",
    "attribute",
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
    "side_of",
]
