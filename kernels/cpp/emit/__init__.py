"""The C++ text of a kernel, assembled from an emitter for each concern."""
