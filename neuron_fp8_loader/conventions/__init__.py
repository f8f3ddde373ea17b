"""Which tensor is the scale of which weight: the published conventions, as data.

``conventions()`` lists them, ``table()`` and ``python -m neuron_fp8_loader.conventions`` print them. One's own::

    from neuron_fp8_loader import conventions

    conventions.register(conventions.Convention("mine", "{}.w_fp8", "{}.w_fp8_mult", "our trainer"))
"""

from .activations import ACTIVATION_RULES, ActivationRule, activation_rule, partner_of
from .convention import Convention
from .lookalikes import PACKED_DTYPES, is_marker, packed_owners, weight_endings
from .registry import Candidates, conventions, module_of, register, unregister
from .table import table

__all__ = [
    "ACTIVATION_RULES",
    "PACKED_DTYPES",
    "ActivationRule",
    "Candidates",
    "Convention",
    "activation_rule",
    "conventions",
    "is_marker",
    "module_of",
    "packed_owners",
    "partner_of",
    "register",
    "table",
    "unregister",
    "weight_endings",
]
