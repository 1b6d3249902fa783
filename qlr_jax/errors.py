"""The one exception that a user's input can cause."""


class QLRError(ValueError):
    """Something given to qlr-jax cannot be used; the message is one sentence that names it and what to give instead.

    Commands print the message and end with a non-zero status; a bug raises anything else.

    >>> raise QLRError("budget 0.3bpw is below 1.02bpw, the smallest option; give a larger one")
    Traceback (most recent call last):
        ...
    qlr_jax.errors.QLRError: budget 0.3bpw is below 1.02bpw, the smallest option; give a larger one
    """
