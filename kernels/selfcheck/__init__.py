"""Whether a generated kernel is right, and faster than the library, on the device where it is to run."""
