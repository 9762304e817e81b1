"""A small training engine with Dassl's names: configuration, data, schedules, trainer, evaluation, checkpoints."""
