"""Policies: one file each. A policy imports `kvcompile.plan` and its base, nothing else."""
