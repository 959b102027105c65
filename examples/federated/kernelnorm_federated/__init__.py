"""Federated image classification on Flower: see docs/federated.md."""

from importlib.util import find_spec

if find_spec("flwr") is None:
    raise ModuleNotFoundError(
        "Flower is missing: `make federated` installs it into .venv-federated. Then run this with "
        ".venv-federated/bin/python",
        name="flwr",
    )
