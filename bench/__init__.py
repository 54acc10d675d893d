"""Measurements: `mend bench WHAT`. Results that the project quotes are kept in bench/results/."""
