"""Post-training pruning: what to take out on calibration data, and how what is left makes up for it."""
