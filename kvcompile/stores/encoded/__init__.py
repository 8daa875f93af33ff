"""Rows whose older tokens are encoded: their codes, in one stretch of memory or in pages, and the stores of them."""
