"""Refining an allocation by measuring others near it: trials, the moves they make, and what their losses say of the predictions."""
