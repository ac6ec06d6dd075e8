"""Builds the package; everything that is static stands in pyproject.toml."""

from setuptools import setup

setup(packages=["conr_kernels"])
