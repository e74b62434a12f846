"""Which attention kernel runs, and choosing it."""
