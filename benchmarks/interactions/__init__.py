"""Allocation where the damages of matrices interact: what a sum of damages leaves out, kept for comparison. No job uses it."""

from benchmarks.interactions.joint import allocate_jointly
from benchmarks.interactions.models import Interactions, Pairwise, Saturating

__all__ = ["Interactions", "Pairwise", "Saturating", "allocate_jointly"]
