"""What becomes of each tensor of a checkpoint, decided from its headers before a byte of weight data is read."""

from .making import make_plan, plan_checkpoint, plan_for, recipe_for
from .plan import ActivationScale, Pair, Plan
from .recipe import ALL, Recipe, Step, Verdict, converted, make_recipe

__all__ = [
    "ALL",
    "ActivationScale",
    "Pair",
    "Plan",
    "Recipe",
    "Step",
    "Verdict",
    "converted",
    "make_plan",
    "make_recipe",
    "plan_checkpoint",
    "plan_for",
    "recipe_for",
]
