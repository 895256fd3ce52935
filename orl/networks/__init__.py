"""Backbones, heads and the online/target pair."""
