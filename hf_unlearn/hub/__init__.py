"""To the Hub: what of a result is uploaded, its model card, and the upload in one commit."""

from hf_unlearn.hub.card import UnlearningCardData, UnlearningModelCard
from hf_unlearn.hub.contents import ForgetResult
from hf_unlearn.hub.push import HubPush
from hf_unlearn.hub.repository import HubRepository, PushError


__all__ = [
    "ForgetResult",
    "HubPush",
    "HubRepository",
    "PushError",
    "UnlearningCardData",
    "UnlearningModelCard",
]
