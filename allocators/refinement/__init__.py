"""Better an allocation by measuring others near it."""
