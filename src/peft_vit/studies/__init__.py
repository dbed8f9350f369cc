"""Many runs: plan a study, have its runs done by an executor, keep their records, continue after an interruption."""
