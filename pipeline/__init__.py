"""What a person touches: command line, config, progress, reports."""
