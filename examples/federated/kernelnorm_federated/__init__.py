"""Federated image classification on Flower: see docs/federated.md."""
