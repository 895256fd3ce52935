"""Stage 1 and stage 3: objectives, augmentation, schedules and the training loop."""
