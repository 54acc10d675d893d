"""Zero-shot restoration: operators, priors, schedules and schemes."""
