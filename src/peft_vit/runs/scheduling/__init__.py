"""Many runs: plan them, have them done by an executor, keep their records, continue after an interruption."""
