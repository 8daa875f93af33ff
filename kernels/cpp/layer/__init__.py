"""The two halves of a decoder layer around its attention, for the rows of a decode step, in C++."""
