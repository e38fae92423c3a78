"""Training of a job: one rank of the gang."""
