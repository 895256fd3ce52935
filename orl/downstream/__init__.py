"""Evaluations of a backbone."""
