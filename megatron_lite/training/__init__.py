"""Floor 5: engine, loop, objectives, optimizers, schedules, hooks."""
