"""pass@k, intervals and paired comparisons; numpy and scipy alone."""

from evals.stats.intervals import (
    Counts,
    Interval,
    accuracy_interval,
    clustered_mean,
    pass_at_k,
    pass_at_k_interval,
    rate_interval,
)
from evals.stats.paired import (
    McNemar,
    PairedResult,
    holm,
    mcnemar,
    minimum_detectable_difference,
    paired_difference,
    paired_means,
    paired_pass_at_k,
    stratified_difference,
)

__all__ = [
    "Counts",
    "Interval",
    "McNemar",
    "PairedResult",
    "accuracy_interval",
    "clustered_mean",
    "holm",
    "mcnemar",
    "minimum_detectable_difference",
    "paired_difference",
    "paired_means",
    "paired_pass_at_k",
    "pass_at_k",
    "pass_at_k_interval",
    "rate_interval",
    "stratified_difference",
]
