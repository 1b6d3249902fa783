"""What goes wrong in this package, as exceptions."""


class AllocationError(ValueError):
    """A table, a budget or a lock that cannot be used; the text names the bad value and what to pass instead."""


class Infeasible(AllocationError):
    """Every value is well formed, yet no allocation satisfies all of them: limit, locks, ties."""
