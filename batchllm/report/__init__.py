"""What users read: plans before a run, summaries after it."""
