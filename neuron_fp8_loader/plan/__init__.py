"""What becomes of each tensor of a checkpoint, decided from its headers before a byte of weight data is read."""

from .pairs import ActivationScale, Pair, Plan, make_plan, plan_checkpoint, plan_for, size

__all__ = ["ActivationScale", "Pair", "Plan", "make_plan", "plan_checkpoint", "plan_for", "size"]
