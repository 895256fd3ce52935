"""Backbones, heads and the online/target pair."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels of 0 to 1: what all backbones take
