"""Scoring and losses at the scale of a vocabulary: the problems, every contender's call, memory, table and figures."""
