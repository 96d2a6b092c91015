"""Ranks that compute together: what they tell each other, and that a dead or silent one is noticed."""
