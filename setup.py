"""What is installed: the Python packages. Metadata stands in pyproject.toml."""

from setuptools import setup

setup(packages=["rwn_ext", "rwn_ext.paper"])
