"""The report as a page: sections, tables and drawings."""
