"""What this machine can run: devices, compilers, backends, and whether generated kernels are right here."""
