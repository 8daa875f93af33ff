"""The plan and what it is made of, as pure data: no torch."""
