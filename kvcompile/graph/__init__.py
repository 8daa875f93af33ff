"""The model as a torch.fx graph with K/V as explicit edges."""
