"""Which option each matrix gets: exact allocation of rank and bits under a memory budget (numpy and scipy only)."""

from allocators.allocation import Allocation, Status, from_specs
from allocators.baselines import baselines, filled_uniform, greedy, random, rank0, uniform
from allocators.budget import Budget, Problem, format_size, parse_size
from allocators.errors import AllocationError, Infeasible
from allocators.frontier import Frontier, frontier
from allocators.knapsack import allocate
from allocators.options import ModelFacts, Option, Row, Tie, backbone
from allocators.prune import Dropped, Pruned, prune
from allocators.table import OptionTable

__all__ = [
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
    "Row",
    "Status",
    "Tie",
    "allocate",
    "backbone",
    "baselines",
    "filled_uniform",
    "format_size",
    "from_specs",
    "frontier",
    "greedy",
    "parse_size",
    "prune",
    "random",
    "rank0",
    "uniform",
]
