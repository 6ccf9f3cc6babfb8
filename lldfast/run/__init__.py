"""One run on disk and in memory: configuration, folder, experiment, checkpoints, logs."""
