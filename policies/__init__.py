"""Policies: one file each. A policy imports `kvcompile.plan`, `kvcompile.selection` and its base, nothing else."""
