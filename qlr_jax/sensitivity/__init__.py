"""Model and statistics -> what every option of every matrix costs and damages."""

from qlr_jax.sensitivity.knockout import knockout
from qlr_jax.sensitivity.predict import Profile, grid_error, predict, profile
from qlr_jax.sensitivity.table import Sensitivity, facts, measure, options, prediction_quality, price

__all__ = [
    "Profile",
    "Sensitivity",
    "facts",
    "grid_error",
    "knockout",
    "measure",
    "options",
    "predict",
    "prediction_quality",
    "price",
    "profile",
]
