"""Which option each matrix gets under a memory budget, from numbers alone: numpy, no JAX, no model, no files.

A table (`OptionTable`) and a limit (`Budget`) go in. `allocate` returns the exact best with its proof, `frontier` the curve of all
limits, `compared` any of STRATEGIES with the others beside it, and `refine` improves one by a few measurements of the true loss.
"""

from allocators.allocation import Allocation, Status, from_specs
from allocators.baselines import filled_uniform, greedy, random, rank0, uniform
from allocators.budget import Budget, Problem, format_size, parse_size
from allocators.errors import AllocationError, Infeasible
from allocators.exact.frontier import Frontier, frontier
from allocators.exact.knapsack import allocate
from allocators.options import ModelFacts, Option, Row, Tie, backbone
from allocators.prune import Dropped, Pruned, prune
from allocators.refinement.trials import Refined, Trial, refine
from allocators.strategies import (
    STRATEGIES,
    Role,
    Strategy,
    baselines,
    compared,
    delivered,
    find_strategy,
    job_plans,
    solved_strategies,
)
from allocators.table import OptionTable

__all__ = [
    "STRATEGIES",
    "Allocation",
    "AllocationError",
    "Budget",
    "Dropped",
    "Frontier",
    "Infeasible",
    "ModelFacts",
    "Option",
    "OptionTable",
    "Problem",
    "Pruned",
    "Refined",
    "Role",
    "Row",
    "Status",
    "Strategy",
    "Tie",
    "Trial",
    "allocate",
    "backbone",
    "baselines",
    "compared",
    "delivered",
    "filled_uniform",
    "find_strategy",
    "format_size",
    "from_specs",
    "frontier",
    "greedy",
    "job_plans",
    "parse_size",
    "prune",
    "random",
    "rank0",
    "refine",
    "solved_strategies",
    "uniform",
]
