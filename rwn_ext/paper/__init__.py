"""The paper's networks, data, training and experiments; `python -m rwn_ext.paper --help`."""
