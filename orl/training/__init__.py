"""What pre-training and fine-tuning share: samples in batches, augmentation, checkpoints, the loop."""
