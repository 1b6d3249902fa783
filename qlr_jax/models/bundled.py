"""The model that comes with the package: five million weights, trained on Python's standard library."""

from pathlib import Path

BUNDLED, BUNDLED_NAME = Path(__file__).parents[1] / "bundled", "bundled"
