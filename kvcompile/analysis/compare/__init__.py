"""Recipes side by side on one model: each answers the same prompts over the cache that it leaves."""
