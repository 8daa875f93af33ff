"""Repair of converted models by a short training towards the original one."""
