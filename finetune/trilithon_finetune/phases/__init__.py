"""The phases of a job around its training: each a process of its own."""
