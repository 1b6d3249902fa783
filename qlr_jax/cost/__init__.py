"""What a job will need, from a configuration and a recipe alone: sizes, memory and seconds by stage, disk.

    memory of a stage   the runtime + what earlier stages keep + what this stage needs for itself
    seconds of a stage  Σ work · rate;  work: products, factorizations, searches, elementwise passes, compilations

Everything is counted as the code does it today, on one device of one process: float32 weights resident from loading to saving, or
where they would take half of the memory (`settings.limits`) one block of them, with the Hessians in files. Rates are those of
one machine's CPU, fitted to real jobs (`benchmarks/cost.py` runs them again and sets predictions beside them); those of GPU and
TPU are scaled from makers' figures and have not been measured. No array is made and no JAX backend starts, unless the rates are
measured on this machine first (`measured_rates`), for a job that is to run here.

    machine  what it runs on        rates  seconds of each kind of work        measured  those of this machine
    counted  sizes of everything    memory, work, solves  what the stages take    stages  both together
    sizes, advice, notes  the budget's place, what is in the way and would help, what to know    plan  all of it    find  models
"""

from qlr_jax.cost.counted import Counted
from qlr_jax.cost.find import find_config
from qlr_jax.cost.machine import Machine
from qlr_jax.cost.measured import measured_rates
from qlr_jax.cost.memory import Part, of_a_worker
from qlr_jax.cost.plan import Plan, plan_job
from qlr_jax.cost.rates import RATES, Rates, Work
from qlr_jax.cost.stages import MEMORY_ERROR, Stage

__all__ = [
    "MEMORY_ERROR",
    "RATES",
    "Counted",
    "Machine",
    "Part",
    "Plan",
    "Rates",
    "Stage",
    "Work",
    "find_config",
    "measured_rates",
    "of_a_worker",
    "plan_job",
]
