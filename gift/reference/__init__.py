"""What the frozen base model contributes to an objective: asked online, or scored once and read from a cache.

    OnlineReference   runs the base beside the policy: one more model in memory, one more backbone pass a micro-batch
    CachedReference   reads what `python -m gift.reference score` stored: log p(y) and H(p) of every response token and,
                      where a token's target needs them, the largest probabilities; training then costs what SFT costs

The base is frozen and the data are fixed, so both say the same in every epoch. The cache keeps the target's
total-variation error of every token below a tolerance; see `gift.reference.cache` for the bound.
"""

from gift.reference.cache import CachedReference, CacheInfo, Demand
from gift.reference.online import OnlineReference

__all__ = ["CacheInfo", "CachedReference", "Demand", "OnlineReference"]
