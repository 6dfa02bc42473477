"""Deletion requests one after another: a ledger of memorising adapters, and the model with any subset of them."""

from hf_unlearn.requests.ledger import Ledger
from hf_unlearn.requests.measurement import Measurement
from hf_unlearn.requests.records import Request


__all__ = ["Ledger", "Measurement", "Request"]
