"""The exact allocation: hull, reduction by the Lagrangian bound, dynamic programming, and the curve of all limits."""
