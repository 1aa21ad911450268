"""Which products of a model use which accumulator: policies, attaching them to any model, and what they then cover."""

from fmaq.emulation.attach import attach, detach, policy_of
from fmaq.emulation.coverage import Coverage, CoverageRow, coverage
from fmaq.emulation.policy import Policy, Rule
from fmaq.emulation.products import FmaqCoverageWarning, Product, listening

__all__ = [
    "Coverage",
    "CoverageRow",
    "FmaqCoverageWarning",
    "Policy",
    "Product",
    "Rule",
    "attach",
    "coverage",
    "detach",
    "listening",
    "policy_of",
]
