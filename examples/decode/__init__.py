"""The latency of a decode step: model (weights), loop (the step), measure (a process per backend), card (printing)."""
