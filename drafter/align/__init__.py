"""Aligning a drafter to a target: collecting the target's answers, training, measuring."""
