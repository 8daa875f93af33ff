"""How a token is decoded where kernels stand for parts of its layers."""
