"""Planted faults: single changes to the code that the tests must notice (``make mutants``)."""
