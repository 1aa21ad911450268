"""Which products of a model use which accumulator: policies, attaching them to any model, and what they then cover."""

from fmaq.emulation.attach import attach, detach, emulating, policy_of
from fmaq.emulation.coverage import Coverage, CoverageRow, coverage
from fmaq.emulation.frozen import frozen
from fmaq.emulation.noise import call_counts, restart_calls
from fmaq.emulation.policy import Policy
from fmaq.emulation.pretrained import from_pretrained
from fmaq.emulation.products import FmaqCoverageWarning, Product, listening
from fmaq.emulation.rule import Rule

__all__ = [
    "Coverage",
    "CoverageRow",
    "FmaqCoverageWarning",
    "Policy",
    "Product",
    "Rule",
    "attach",
    "call_counts",
    "coverage",
    "detach",
    "emulating",
    "from_pretrained",
    "frozen",
    "listening",
    "policy_of",
    "restart_calls",
]
