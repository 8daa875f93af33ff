"""What a job says of itself: report, tables, plots, plan table, model card."""
