"""The stages of a job, each a function of the run and of what the stages before it found."""

from qlr_jax.pipelines.stages.ahead import compiling_ahead
from qlr_jax.pipelines.stages.allocate import allocate
from qlr_jax.pipelines.stages.calibrate import calibrate, check_texts
from qlr_jax.pipelines.stages.measure import measure
from qlr_jax.pipelines.stages.refine import refine
from qlr_jax.pipelines.stages.save import save
from qlr_jax.pipelines.stages.select import evaluate_held_out, evaluate_on_calibration, select
from qlr_jax.pipelines.stages.sequential import solve_in_sequence
from qlr_jax.pipelines.stages.solve import solve_plans

__all__ = [
    "allocate",
    "calibrate",
    "check_texts",
    "compiling_ahead",
    "evaluate_held_out",
    "evaluate_on_calibration",
    "measure",
    "refine",
    "save",
    "select",
    "solve_in_sequence",
    "solve_plans",
]
