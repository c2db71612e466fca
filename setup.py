"""What is installed: the Python packages. Metadata stands in pyproject.toml."""

from setuptools import setup

# rwn_ext/kernels is a link to kernels: the package is named in full, because no search for packages follows links.
setup(packages=["rwn_ext", "rwn_ext.kernels", "rwn_ext.paper"])
