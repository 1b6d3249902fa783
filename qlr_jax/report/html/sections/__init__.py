"""The sections of report.html, in the order in which one who decides asks."""
