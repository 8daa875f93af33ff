"""A compiled model as a folder: written atomically, checked before it is read, nothing in it executed."""
