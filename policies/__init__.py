"""Policies: one file each. A policy imports `kvcompile.plan.plan`, `kvcompile.plan.selection` and its base, nothing else."""
